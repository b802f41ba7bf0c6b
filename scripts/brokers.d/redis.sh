# Redis: one node (redis), or a cluster of three without replicas (redis3-1..3).

redis_need() { need_program redis-server redis-server redis-tools; }

redis_start() { # server
  local port
  port=$(port_of "$1")
  {
    printf '%s\n' "bind 127.0.0.1" "protected-mode yes" "port $port" "daemonize no" "dir $data/$1" \
      "appendonly yes" "appendfsync everysec" "maxmemory-policy noeviction" "save ''"
    case $1 in
      redis3-*) printf '%s\n' "cluster-enabled yes" "cluster-port $((port + 10))" "cluster-node-timeout 2000" "cluster-config-file nodes.conf" ;;
    esac
  } >"$data/$1/redis.conf"
  launch "$1" redis-server "$data/$1/redis.conf"
}

redis_ready() { # server; also false while the append-only file is being loaded
  [ "$(timeout 2 redis-cli -p "$(port_of "$1")" ping)" = PONG ]
}

redis3_assembled() { timeout 2 redis-cli -p "$(port_of redis3-1)" cluster info | grep -q '^cluster_state:ok'; }

redis3_assemble() {
  local deadline=$((SECONDS + ready_deadline_s)) nodes=() n output
  for n in 1 2 3; do nodes+=("127.0.0.1:$(port_of "redis3-$n")"); done
  # Nodes that were in a cluster find each other again.
  if [ ! -e "$data/redis3-1/assembled" ]; then
    output=$(redis-cli --cluster create "${nodes[@]}" --cluster-yes 2>&1) || { printf '%s\n' "$output" >&2; fail "the Redis cluster was not created"; }
    touch "$data/redis3-1/assembled"
  fi
  until redis3_assembled; do
    [ "$SECONDS" -lt "$deadline" ] || fail "the Redis cluster was not complete within $ready_deadline_s s"
    sleep 0.1
  done
}
