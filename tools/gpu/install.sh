#!/bin/sh
# Install LoopLM beside the machine's own torch, without a network: ./install.sh [PYTHON]
# The machine needs Python 3.12 with torch. Everything else comes from wheels/ unless the machine has it already.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
python=${1:-python3}
fail() { echo "error: $1" >&2; exit 2; }

"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' \
    || fail "$python: is not Python 3.12, which the wheels are for; give another: $0 /path/to/python3.12"
"$python" -c 'import torch' || fail "$python: has no torch; give the Python that has it: $0 /path/to/python3.12"

cd "$here/source"
# Without ensurepip (Debian's python3-venv) the machine's pip installs into the environment.
"$python" -m venv --clear --system-site-packages .venv >/dev/null 2>&1 \
    || "$python" -m venv --clear --system-site-packages --without-pip .venv
own=$PWD/.venv/bin/python
# If PYTHON is in a virtual environment itself, --system-site-packages shows the packages of the Python below it and not
# its own, torch among them.
"$python" -c 'import sys; print(*[p for p in sys.path if p.endswith(("site-packages", "dist-packages"))], sep="\n")' \
    > "$("$own" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/machine.pth"

# pip reads no configuration of the machine's, which might name an index or constraints.
install() {
    if "$own" -c 'import pip' 2>/dev/null; then
        PIP_CONFIG_FILE=/dev/null "$own" -m pip install --quiet --no-index --find-links "$here/wheels" "$@"
    else
        PIP_CONFIG_FILE=/dev/null "$python" -m pip --python "$own" install --quiet --no-index \
            --find-links "$here/wheels" "$@"
    fi
}
install -r "$here/requirements.txt"

set -- "$here"/wheels/transformer_engine_torch-*.tar.gz
if [ -e "$1" ]; then
    echo "building Transformer Engine: 10 to 30 minutes, with nvcc"
    install --no-deps "$here"/wheels/transformer_engine-*.whl "$here"/wheels/transformer_engine_cu13-*.whl
    NVTE_FRAMEWORK=pytorch install --no-deps --no-build-isolation "$1"
fi

# make then takes the environment as it is.
cp constraints.txt .venv/constraints.txt
touch .venv/.installed
"$own" -c 'import torch, megatron.core; print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, ready")'
echo "now: cd $here/source && make gpu-check    (or: .venv/bin/python -m tools.gpu_check)"
