import subprocess
import sys

ENDING = """
import atexit
from fdfo_engine.runtime.process import end_process

class Last:
    def __del__(self):
        print("finalised")

last = Last()
atexit.register(print, "exit function")
print("unflushed ", end="")
end_process(75)
"""


def test_output_and_exit_functions_are_kept_and_finalisation_is_not():
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (75, "unflushed exit function\n", "")
