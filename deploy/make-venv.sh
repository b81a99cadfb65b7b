#!/bin/sh
# Makes a virtual environment with pip in it.
#   usage: [PYTHON=python3.12] deploy/make-venv.sh FOLDER
# Debian keeps ensurepip, which `python3 -m venv` needs, in a package of its own that a bare system lacks.
set -eu

folder=$1
python=${PYTHON:-python3}

fail() {
    echo "$0: $1" >&2
    exit 1
}

has() {
    "$python" -c "import $1" 2>/dev/null
}

may_install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Sapin needs Python 3.11 or later; name one, as in: make PYTHON=python3.12 run"

if has ensurepip; then
    "$python" -m venv "$folder"
elif has virtualenv; then
    "$python" -m virtualenv --quiet "$folder"
elif has pip; then
    "$python" -m venv --without-pip "$folder"
    "$python" -m pip --python "$folder/bin/python" install --quiet pip
elif may_install; then
    "${0%/*}/install-apt.sh" "${0%/*}/apt-packages-venv.txt"
    "$python" -m venv "$folder"
else
    fail "python3 cannot make a virtual environment; as root, run: apt-get install python3-venv"
fi
