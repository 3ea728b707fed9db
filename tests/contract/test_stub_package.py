"""The stub package that internal teams install: the wire and nothing of ours."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_stub_wheel_holds_the_generated_code_and_works_by_itself(tmp_path: Path) -> None:
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*wheel, "-w", str(tmp_path), str(ROOT / "protos")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("gpumesh_stubs-*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "gpumesh/router/v1/inference_service_pb2_grpc.py" in names
    assert not [name for name in names if not name.startswith(("gpumesh/", "gpumesh_stubs-"))]
    # Only the stubs on the path: grpcio and protobuf come from this environment, nothing of gpumesh_… does.
    code = (
        "import sys; sys.path = [p for p in sys.path if not p.endswith(('/src', 'gen/python'))]\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "from gpumesh.router.v1 import inference_service_pb2 as pb, inference_service_pb2_grpc\n"
        "assert pb.__file__.startswith(sys.path[0]), pb.__file__\n"
        "print(pb.InferRequest(model='m').model, inference_service_pb2_grpc.InferenceServiceStub.__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.stdout.split() == ["m", "InferenceServiceStub"], ran.stderr
