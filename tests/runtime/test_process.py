import os
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


def test_a_tracker_that_listens_to_sys_exit_hears_the_status():
    script = (
        "import sys\nfrom fdfo_engine.runtime.process import end_process\nleave = sys.exit\n"
        "sys.exit = lambda status: print('heard', status) or leave(status)\nend_process(5)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (5, "heard 5\n", "")


def test_the_status_survives_a_reader_that_has_gone():
    read_end, write_end = os.pipe()
    os.close(read_end)
    script = "from fdfo_engine.runtime.process import end_process\nprint('x')\nend_process(75)"
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=buffered, stdout=write_end, stderr=subprocess.PIPE, timeout=60
    )  # fmt: skip
    os.close(write_end)
    assert (done.returncode, done.stderr) == (75, b"")


def test_output_and_exit_functions_are_kept_and_finalisation_is_not():
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (75, "unflushed exit function\n", "")
