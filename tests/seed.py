"""What random numbers of tests start from, and the examples of Hypothesis: a commit that passes once passes again.

`SPT_TEST_SEED=7 make test` draws others, to look for what no test has met yet.
"""

import os

SEED = int(os.environ.get("SPT_TEST_SEED", "0"))
"""0, where Hypothesis derives its examples from the tests; else it draws new ones each time."""
