"""`jpeft compare`: methods trained on the same rows of the same model with the same care, and one table of them."""
