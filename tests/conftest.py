"""What all tests share: two compute threads at most, and no trace left in the user's cache."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
