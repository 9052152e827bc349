"""torch + onnx + its runtimes: the deployed network as a file that other programs run, and in int8."""

import os
import sys

# Before anything below imports them: both would tell their makers which networks are run here, and leave a number for
# this user in the home directory. onnxruntime's switch is its own; a user who sets it to 0 keeps that. OpenVINO's would
# be a file in the home directory; without the package, which is another's dependency, it sends nothing.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
