#!/bin/bash
# In the stand-in image: does for each server what the entry point of its official image does, as far as compose.yaml needs it.
set -euo pipefail

as() { # user, command: in its place
  local user=$1
  shift
  exec setpriv --reuid="$user" --regid="$user" --init-groups env HOME="$(getent passwd "$user" | cut -d : -f 6)" "$@"
}

postgres_first() {
  local made=/var/lib/postgresql/made db=/var/lib/postgresql/data bin=$1
  [ ! -e "$made" ] || return 0
  rm -rf "$db"
  printf '%s\n' "$POSTGRES_PASSWORD" >/var/lib/postgresql/password
  (as postgres "$bin/initdb" -D "$db" -U "$POSTGRES_USER" --pwfile=/var/lib/postgresql/password --auth=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8)
  printf 'host all all all scram-sha-256\n' >>"$db/pg_hba.conf"
  (printf 'CREATE DATABASE %s;\n' "$POSTGRES_DB" | as postgres "$bin/postgres" --single -D "$db" postgres)
  touch "$made"
}

case $1 in
  redis-server)
    cd /var/lib/redis
    as redis "$@"
    ;;
  rabbitmq-server)
    printf '%s\n' "listeners.tcp.default = 5672" "default_user = $RABBITMQ_DEFAULT_USER" "default_pass = $RABBITMQ_DEFAULT_PASS" \
      "loopback_users = none" "log.console.level = info" >/etc/rabbitmq/rabbitmq.conf
    export RABBITMQ_LOGS=- RUNNING_UNDER_SYSTEMD=1
    # The one on the path is Debian's, which leaves a shell in front of the server.
    as rabbitmq /usr/lib/rabbitmq/bin/rabbitmq-server
    ;;
  postgres)
    shift
    bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
    postgres_first "$bin"
    # A container that was killed keeps the file, and its first process has the same number again.
    rm -f /var/lib/postgresql/data/postmaster.pid
    as postgres "$bin/postgres" -D /var/lib/postgresql/data -c listen_addresses='*' "$@"
    ;;
  *) exec "$@" ;;
esac
