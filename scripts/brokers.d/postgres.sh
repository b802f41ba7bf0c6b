# PostgreSQL, and PgBouncer in transaction mode before it. Neither runs as root: then user postgres takes them.

postgres_need() { need_program postgres postgresql; }
pgbouncer_need() { need_program pgbouncer pgbouncer; }

# Words that run a command as the user for PostgreSQL; none when we are not root.
postgres_as=()
if [ "$(id -u)" = 0 ]; then postgres_as=(setpriv --reuid=postgres --regid=postgres --init-groups); fi

# The folder of the data. A user other than root may be locked out of the repository's folder: then it is elsewhere, linked.
postgres_folder() { # server
  local folder=$data/$1
  if [ "$(id -u)" = 0 ] && [ ! -L "$folder/pg" ]; then
    chown postgres: "$folder"
    if "${postgres_as[@]}" test -w "$folder"; then
      folder=$folder/pg
      mkdir -p "$folder"
      chown postgres: "$folder"
    else
      folder=$(mktemp -d "/var/tmp/hapax-$1-$base.XXXXXX")
      chown postgres: "$folder"
      note "user postgres cannot reach $data; its data is in $folder"
      rmdir "$data/$1/pg" 2>/dev/null || true
      ln -s "$folder" "$data/$1/pg"
    fi
  else
    mkdir -p "$folder/pg"
  fi
  readlink -f "$data/$1/pg"
}

postgres_start() { # server
  local folder password
  folder=$(postgres_folder postgres)
  if [ ! -e "$folder/made" ]; then
    rm -rf "${folder:?}/db"
    password=$folder/password
    printf 'hapax\n' >"$password"
    [ "$(id -u)" != 0 ] || chown postgres: "$password"
    mkdir -p "$logs"
    "${postgres_as[@]}" "$(program_path initdb)" -D "$folder/db" -U hapax --pwfile="$password" --auth=scram-sha-256 \
      --encoding=UTF8 --locale=C.UTF-8 --data-checksums >"$logs/initdb.log" 2>&1 ||
      { tail -n 20 "$logs/initdb.log" >&2; fail "initdb failed"; }
    printf 'CREATE DATABASE hapax;\n' |
      (cd "$folder" && "${postgres_as[@]}" "$(program_path postgres)" --single -D "$folder/db" postgres) >>"$logs/initdb.log" 2>&1 ||
      { tail -n 20 "$logs/initdb.log" >&2; fail "the database was not created"; }
    touch "$folder/made"
  fi
  forget_dead_postmaster "$folder/db/postmaster.pid"
  # fsync is on, as it is by default: what is measured is what users have. An index of 10^7 records fits into the buffers.
  launch postgres "${postgres_as[@]}" "$(program_path postgres)" -D "$folder/db" -p "$(port_of postgres)" \
    -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c max_connections=200 -c shared_buffers=1GB \
    -c max_wal_size=2GB
}

# After kill -9 the process may remain as a zombie that nobody reaps, and PostgreSQL takes it for a living one.
forget_dead_postmaster() { # file
  local pid state began
  { read -r pid <"$1"; } 2>/dev/null || return 0
  if read -r state began < <(stat_of "$pid") && [ "$state" = Z ]; then rm -f "$1"; fi
}

postgres_ready() { # server
  # A real query: "accepting connections" is also said while the password file is not.
  PGCONNECT_TIMEOUT=2 PGPASSWORD=hapax timeout 3 psql -h 127.0.0.1 -p "$(port_of "$1")" -U hapax -d hapax -Atqc 'SELECT 1' | grep -qx 1
}

pgbouncer_start() { # server
  local folder
  folder=$(postgres_folder pgbouncer)
  printf '"hapax" "hapax"\n' >"$folder/users.txt"
  printf '%s\n' "[databases]" "* = host=127.0.0.1 port=$(port_of postgres)" "[pgbouncer]" "listen_addr = 127.0.0.1" \
    "listen_port = $(port_of pgbouncer)" "unix_socket_dir =" "auth_type = scram-sha-256" "auth_file = $folder/users.txt" \
    "pool_mode = transaction" "max_client_conn = 500" "default_pool_size = 20" "ignore_startup_parameters = extra_float_digits" \
    >"$folder/pgbouncer.ini"
  [ "$(id -u)" != 0 ] || chown postgres: "$folder/users.txt" "$folder/pgbouncer.ini"
  launch pgbouncer "${postgres_as[@]}" "$(program_path pgbouncer)" "$folder/pgbouncer.ini"
}

pgbouncer_ready() { postgres_ready "$1"; }
