"""These tests plant faults in compiled kernels: they run where the plugin is, in the process that
`offgpu/test_compiled_kernels.py` starts.
"""

import sys

collect_ignore_glob = [] if "offgpu.ptx.plugin" in sys.modules else ["test_*.py"]
