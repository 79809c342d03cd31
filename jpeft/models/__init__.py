"""Compact NNX models driven by Hugging Face configurations, with stacked layers."""
