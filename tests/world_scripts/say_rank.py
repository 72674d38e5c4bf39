"""Writes its rank and its argument, waits until the others have done so, and fails."""

import os
import sys
import time

print("out", os.environ["RANK"], sys.argv[1], flush=True)
print("err", os.environ["RANK"], file=sys.stderr, flush=True)
time.sleep(1.0)  # torchrun ends all ranks at the first failure
sys.exit(3)
