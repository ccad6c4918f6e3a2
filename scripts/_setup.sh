# Sourced by the other scripts: makes a virtual environment in the checkout and installs the project in it.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
needed_gb=5

die() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# Prints the first Python that the project supports; $PYTHON, if set, is the only candidate.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "Python 3.11, 3.12 or 3.13 is needed, and none of ${PYTHON:-python3, python3.13, python3.12, python3.11} is one; install it, or name it: PYTHON=/path/to/python $0"
}

# base_of PYTHON: the interpreter that it is, or that its virtual environment was made with.
base_of() {
    "$1" -c 'import os, sys; print(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))'
}

# set_up [EXTRA]: installs the project, with EXTRA of pyproject.toml. Does nothing if that was done before.
set_up() {
    local extra=${1:-} stamp=$venv/.installed wanted free_gb python
    if [ -n "${PYTHON:-}" ] && [ -x "$venv/bin/python" ]; then
        python=$(find_python)
        # A Python that was asked for, and is not the one of .venv, gets a new .venv.
        [ "$(base_of "$python")" = "$(base_of "$venv/bin/python")" ] || rm -f "$stamp" "$venv/bin/python"
    fi
    wanted="$(sha256sum "$root/pyproject.toml" | cut -c1-16) $root ${extra:-plain}"
    if [ -x "$venv/bin/python" ] && grep -qxF "$wanted" "$stamp" 2>/dev/null; then
        return
    fi
    free_gb=$(($(df -Pk "$root" | awk 'NR == 2 { print $4 }') / 1024 / 1024))
    [ -x "$venv/bin/python" ] || [ "$free_gb" -ge "$needed_gb" ] ||
        die "the disk of $root has $free_gb GB free, and the installation needs $needed_gb; free some space"
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        printf 'making %s with %s\n' "$venv" "$("$python" --version)" >&2
        [ -w "$root" ] || die "$root cannot be written to by $(id -un), and .venv is made there; change its rights, or clone the repository into a folder of your own"
        "$python" -m venv --clear "$venv" ||
            die "$python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"
    fi
    printf 'installing the project%s into %s; the first time takes a few minutes\n' "${extra:+ with [$extra]}" "$venv" >&2
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet --progress-bar on --editable "$root${extra:+[$extra]}" >&2 ||
        die "pip failed, see above. If it could not connect, check the network and pip's index and run this again; if the disk is full ($free_gb GB were free), free some space; to start over, remove $venv"
    # The installation now matches only the stamps of this pyproject.toml.
    grep -F "${wanted% *} " "$stamp" >"$stamp.new" 2>/dev/null || true
    printf '%s\n' "$wanted" >>"$stamp.new"
    [ -z "$extra" ] || printf '%s\n' "${wanted% *} plain" >>"$stamp.new"
    mv "$stamp.new" "$stamp"
}
