# SPDX-License-Identifier: Apache-2.0
"""``python -m vmm``; and where ``vmm/launcher.c`` goes on in an interpreter without ``site``."""

import sys

if "pyvmm" in sys._xoptions:
    import gc

    # What is imported now stays: to look for garbage in it costs a tenth of a start.
    gc.disable()
    # Behind the standard library, which is all there is yet. Nothing before this line may import anything of ours.
    sys.path += str(sys._xoptions["pyvmm_path"]).split(":")
    from vmm import launched

    launched.begin()
    if "pyvmm_save" in sys._xoptions:
        from vmm.commands import prepare

        prepare.save(str(sys._xoptions["pyvmm_save"]))  # returns in every process that starts from the image
else:
    from vmm import launched

    launched.forget_current_directory()

from vmm.commands.cli import entry

entry()
