"""Never ends, and has a child in a session of its own that does not either."""

import subprocess
import sys
import time

subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("waiting for nothing", flush=True)
time.sleep(600)
