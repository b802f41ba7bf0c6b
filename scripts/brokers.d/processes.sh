# Processes of the set: started apart from the calling shell, known again by pid and start time, signalled with their children.
# A pid alone is not enough: after a crash the number may belong to somebody else.

# state and start time of a process, nothing when it is gone
stat_of() { # pid
  local stat
  { stat=$(<"/proc/$1/stat"); } 2>/dev/null || return 1
  # The second field is the program's name in parentheses and may hold blanks.
  read -ra stat <<<"${stat##*) }"
  printf '%s %s\n' "${stat[0]}" "${stat[19]}"
}

record_pid() { # server, pid
  local state began
  # Gone already: the wait for readiness tells with its log.
  read -r state began < <(stat_of "$2") || return 0
  printf '%s %s\n' "$2" "$began" >"$run/$1.pid"
}

pid_of() { # server: its pid while it runs, paused or not; fails otherwise
  local pid began state now
  { read -r pid began <"$run/$1.pid"; } 2>/dev/null || return 1
  read -r state now < <(stat_of "$pid") || return 1
  # A zombie that nobody reaps has ended too.
  [ "$began" = "$now" ] && [ "$state" != Z ] && printf '%s\n' "$pid"
}

is_paused() { # server
  local pid state began
  pid=$(pid_of "$1") && read -r state began < <(stat_of "$pid") && [ "$state" = T ]
}

family_of_pid() { # pid: itself and all its descendants
  # Some end while their files are read.
  { cat /proc/[0-9]*/stat 2>/dev/null || true; } | awk -v root="$1" '
    { pid = $1; sub(/^.*\) /, ""); parent[pid] = $2 }
    END {
      for (pid in parent) {
        for (at = pid; at in parent && at != root; at = parent[at]);
        if (at == root) print pid
      }
    }'
}

signal_all() { # signal, server: to the process and its descendants
  local pid
  pid=$(pid_of "$2") || return 0
  # A child may have ended meanwhile.
  kill "-$1" $(family_of_pid "$pid") 2>/dev/null || true
}

# Everything inherited is closed: a caller that waits for the end of a pipe would otherwise wait for the server, and a lock
# would be held as long as it lives.
close_inherited() {
  local fd
  for fd in /proc/self/fd/*; do
    fd=${fd##*/}
    case $fd in 0 | 1 | 2 | 255) ;; *) eval "exec $fd>&-" ;; esac
  done
}

launch() { # server, command...
  local server=$1
  shift
  mkdir -p "$run" "$logs"
  [ ! -f "$logs/$server.log" ] || mv -f "$logs/$server.log" "$logs/$server.log.1"
  (
    cd "$data/$server" || exit 1
    close_inherited
    # Not the leader of a group yet, so setsid does not fork, and the pid stays.
    exec setsid "$@" </dev/null >"$logs/$server.log" 2>&1
  ) &
  record_pid "$server" "$!"
}

await_ready() { # server, seconds
  local server=$1 deadline=$((SECONDS + $2)) family
  family=$(family "$server")
  until "${family}_ready" "$server" >/dev/null 2>&1; do
    if ! pid_of "$server" >/dev/null; then
      show_log "$server"
      fail "$server ended while it started"
    fi
    if [ "$SECONDS" -ge "$deadline" ]; then
      show_log "$server"
      fail "$server was not ready within $2 s"
    fi
    sleep 0.1
  done
}

await_end() { # server, seconds
  local deadline=$((SECONDS + $2))
  while pid_of "$1" >/dev/null; do
    [ "$SECONDS" -lt "$deadline" ] || return 1
    sleep 0.05
  done
}

await_end_of_pids() { # seconds, pid...
  local deadline=$((SECONDS + $1)) pid state began
  shift
  for pid in "$@"; do
    while read -r state began < <(stat_of "$pid") && [ "$state" != Z ]; do
      [ "$SECONDS" -lt "$deadline" ] || return 1
      sleep 0.02
    done
  done
}

show_log() { # server
  printf '%s\n' "--- the end of $logs/$1.log:" >&2
  tail -n 30 "$logs/$1.log" >&2 || true
  printf '%s\n' "---" >&2
}

# --- one server --------------------------------------------------------------------------------------------------------

native_start() { # server
  local server=$1 family
  family=$(family "$server")
  if is_paused "$server"; then signal_all CONT "$server"; fi
  if ! pid_of "$server" >/dev/null; then
    mkdir -p "$data/$server" "$run"
    "${family}_start" "$server"
  fi
  await_ready "$server" "$ready_deadline_s"
  touch "$run/$server.up"
}

native_kill() { # server
  local pid pids
  pid=$(pid_of "$1") || fail "$1 does not run"
  pids=$(family_of_pid "$pid")
  kill -KILL $pids 2>/dev/null || true
  await_end_of_pids 10 $pids || fail "$1 (pid $pid) does not end after kill -9"
}

native_stop() { # server: in order, by force when that takes too long
  local signal=TERM pid pids
  pid=$(pid_of "$1") || { rm -f "$run/$1.pid"; return 0; }
  # Fast shutdown: sessions are ended, nothing is recovered afterwards.
  [ "$(family "$1")" != postgres ] || signal=INT
  if is_paused "$1"; then signal_all CONT "$1"; fi
  pids=$(family_of_pid "$pid")
  kill "-$signal" "$pid" 2>/dev/null || true
  if ! await_end "$1" 20; then
    note "$1 does not end in order; killed"
    native_kill "$1"
  fi
  # Helpers of the server may outlive it for a moment.
  await_end_of_pids 5 $pids || kill -KILL $pids 2>/dev/null || true
  rm -f "$run/$1.pid"
}
