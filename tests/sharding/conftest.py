"""The TPU compiler is in libtpu, which few machines have; where it is not, its tests are not among the tests."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("libtpu") else ["test_tpu.py"]
