# What the servers need of the machine: Debian's packages, installed when missing and if we may.

wanted_programs=()
missing_packages=()

need_program() { # program, packages that bring it
  wanted_programs+=("$1")
  [ -n "$(program_path "$1")" ] || missing_packages+=("${@:2}")
}

# One installation, or one message, for all that was needed.
install_missing() {
  local program
  [ ${#missing_packages[@]} = 0 ] || install_packages "${missing_packages[@]}"
  for program in ${wanted_programs[@]+"${wanted_programs[@]}"}; do
    [ -n "$(program_path "$program")" ] || fail "$program is still missing after the installation of: ${missing_packages[*]}"
  done
  missing_packages=()
}

program_path() { # program: also where Debian keeps what is not on the path
  local found
  case $1 in
    # The newest, where several are installed.
    postgres | initdb | createdb) found=$(ls -d /usr/lib/postgresql/*/bin/"$1" 2>/dev/null | sort -V | tail -n 1) ;;
    # Those on the path refuse to run, or run as user rabbitmq, with that user's folders.
    rabbitmq-server | rabbitmqctl) found=/usr/lib/rabbitmq/bin/$1 ;;
    *) found= ;;
  esac
  if [ -n "$found" ] && [ -x "$found" ]; then
    printf '%s\n' "$found"
  else
    PATH="$PATH:/usr/sbin:/sbin" command -v "$1" || true
  fi
}

install_packages() { # packages
  local missing="$*"
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    fail "missing: $missing; install with: sudo apt-get install --no-install-recommends $missing"
  fi
  note "installing $missing"
  local policy=/usr/sbin/policy-rc.d ours= status=0
  # The packages would start servers of their own, on the usual ports.
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    ours=1
  fi
  install_quietly "$@" || status=$?
  if [ -n "$ours" ]; then rm -f "$policy"; fi
  [ "$status" = 0 ] || fail "apt-get could not install: $missing"
}

install_quietly() { # packages
  local output
  export DEBIAN_FRONTEND=noninteractive
  output=$(apt-get update -qq 2>&1) || { printf '%s\n' "$output" >&2; return 1; }
  output=$(apt-get install -qq -y --no-install-recommends "$@" 2>&1) || { printf '%s\n' "$output" | tail -n 20 >&2; return 1; }
}
