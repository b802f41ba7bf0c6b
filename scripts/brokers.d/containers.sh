# The set as containers: compose.yaml through Docker or Podman. Where the official images cannot be had, one stand-in image made
# from Debian's packages runs in their place. Only the four default servers; clusters of three and PgBouncer are native only.

compose_names="redis rabbitmq postgres kafka"
image_deadline_s=${HAPAX_IMAGE_DEADLINE:-300}

container() { echo "hapax-$base-$1"; } # server

engine() { # arguments; nothing inherited, for the monitor of a container lives as long as the container
  (
    close_inherited
    exec "$(cat "$run/engine")" "$@"
  )
}

compose() { # arguments
  export HAPAX_CONTAINERS=hapax-$base
  export HAPAX_REDIS_PORT=$((base + 379)) HAPAX_RABBITMQ_PORT=$((base + 672)) HAPAX_POSTGRES_PORT=$((base + 432))
  export HAPAX_KAFKA_PORT=$((base + 92)) HAPAX_KAFKA_DIRECT_PORT=$((base + 94)) HAPAX_KAFKA_PROXY_PORT=$((base + 95))
  (
    # shellcheck source=/dev/null
    if [ -e "$run/images" ]; then . "$run/images"; fi
    close_inherited
    if [ "$(cat "$run/engine")" = docker ]; then
      exec docker compose -p "hapax-$base" -f "$root/compose.yaml" "$@" </dev/null
    else
      exec podman-compose -p "hapax-$base" -f "$root/compose.yaml" "$@" </dev/null
    fi
  )
}

# --- an engine that answers --------------------------------------------------------------------------------------------

containers_need() { # servers
  mkdir -p "$run" "$logs"
  [ -e "$run/engine" ] || choose_engine
  podman_settings
  [ -e "$run/images" ] || choose_images
}

choose_engine() {
  if docker compose version >/dev/null 2>&1 && timeout 10 docker info >/dev/null 2>&1; then
    echo docker >"$run/engine"
    return
  fi
  need_program podman podman runc netavark aardvark-dns containernetworking-plugins iptables
  need_program podman-compose podman-compose
  install_missing
  echo podman >"$run/engine"
  podman_settings
  engine info >/dev/null || { rm -f "$run/engine"; fail "neither Docker nor Podman answers"; }
}

# Podman as root, inside of a container or a small machine: limits above the hard limits make every start fail, and so does crun
# on some kernels. Settings of the user's are left alone.
podman_settings() {
  [ "$(cat "$run/engine")" = podman ] && [ "$(id -u)" = 0 ] && [ -z "${CONTAINERS_CONF:-}" ] || return 0
  export CONTAINERS_CONF=$run/containers.conf
  local files processes
  files=$(ulimit -Hn)
  processes=$(ulimit -Hu)
  # Not the hard limits themselves: what is allowed on the way to the container may be lower still (seen with processes).
  { [ "$files" != unlimited ] && [ "$files" -le 16384 ]; } || files=16384
  { [ "$processes" != unlimited ] && [ "$processes" -le 16384 ]; } || processes=16384
  {
    printf '[containers]\ndefault_ulimits = ["nofile=%s:%s", "nproc=%s:%s"]\n' "$files" "$files" "$processes" "$processes"
    [ -z "$(program_path runc)" ] || printf '[engine]\nruntime = "runc"\n'
  } >"$CONTAINERS_CONF"
}

choose_images() {
  local image
  for image in $(sed -n 's/^ *image: .*:-\(.*\)}$/\1/p' "$root/compose.yaml"); do
    if ! has_image "$image" && ! timeout "$image_deadline_s" "$(cat "$run/engine")" pull "$image" >>"$logs/pull.log" 2>&1; then
      note "the image $image cannot be had ($(tail -n 1 "$logs/pull.log" | cut -c 1-200))"
      choose_stand_in
      return
    fi
  done
  : >"$run/images"
}

has_image() { engine image inspect "$1" >/dev/null 2>&1; }

choose_stand_in() {
  local image
  [ "$(cat "$run/engine")" = podman ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
    fail "without the official images the stand-in can be built only by root, with Podman, on Debian"
  # Anew when its recipe or Kafka's version changes.
  image=localhost/hapax-brokers-stand-in:$(cat "$root"/scripts/brokers.d/stand-in/* "$root/scripts/kafka/pom.xml" | cksum | cut -d ' ' -f 1)
  if has_image "$image"; then
    note "all four run from the stand-in image $image"
  else
    need_program debootstrap debootstrap
    kafka_need
    install_missing
    kafka_jars
    note "building the stand-in image $image from Debian's packages (some minutes, once)"
    "$root/scripts/brokers.d/stand-in/build" "$image" "$jars" >"$logs/stand-in.log" 2>&1 ||
      { tail -n 20 "$logs/stand-in.log" >&2; fail "the stand-in image could not be built; the log is $logs/stand-in.log"; }
  fi
  printf 'export HAPAX_%s_IMAGE='"$image"'\n' REDIS RABBITMQ POSTGRES KAFKA >"$run/images"
}

# --- the servers -------------------------------------------------------------------------------------------------------

containers_up() { # servers
  local server missing=()
  for server in "$@"; do
    case " $compose_names " in *" $server "*) ;; *) fail "$server is not among the containers ($compose_names); start it without --containers" ;; esac
    in_set "$server" && [ "$(container_state "$server")" = running ] || missing+=("$server")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    compose up -d "${missing[@]}" >"$logs/compose.log" 2>&1 || { tail -n 20 "$logs/compose.log" >&2; fail "compose up failed"; }
  fi
  each containers_start "$@"
}

container_state() { engine inspect --format '{{.State.Status}}' "$(container "$1")" 2>/dev/null; } # server

containers_await() { # server: the health check of compose.yaml
  local deadline=$((SECONDS + ready_deadline_s * 2))
  until containers_healthy "$1"; do
    if [ "$(container_state "$1")" != running ] || [ "$SECONDS" -ge "$deadline" ]; then
      engine logs --tail 30 "$(container "$1")" >&2 || true
      fail "$(container "$1") is $(container_state "$1"), and not healthy"
    fi
    sleep 0.3
  done
  touch "$run/$1.up"
}

containers_healthy() { # server
  if [ "$(cat "$run/engine")" = docker ]; then
    [ "$(engine inspect --format '{{.State.Health.Status}}' "$(container "$1")" 2>/dev/null)" = healthy ]
  else
    # Podman leaves the rhythm to systemd, which need not be there.
    engine healthcheck run "$(container "$1")" >/dev/null 2>&1
  fi
}

containers_start() { # server
  case $(container_state "$1") in
    paused) engine unpause "$(container "$1")" >/dev/null ;;
    running) ;;
    *) engine start "$(container "$1")" >/dev/null ;;
  esac
  containers_await "$1"
}

containers_kill() {
  local deadline=$((SECONDS + 20))
  engine kill --signal KILL "$(container "$1")" >/dev/null || fail "$1 does not run"
  while [ "$(container_state "$1")" = running ]; do
    [ "$SECONDS" -lt "$deadline" ] || fail "$1 does not end after kill -9"
    sleep 0.1
  done
}

containers_pause() { engine pause "$(container "$1")" >/dev/null; }
containers_resume() { engine unpause "$(container "$1")" >/dev/null; }

containers_down() {
  local server
  [ -e "$run/engine" ] || return 0
  podman_settings
  for server in $(servers_in_set); do
    # A paused container cannot be stopped.
    if [ "$(container_state "$server")" = paused ]; then containers_resume "$server"; fi
  done
  compose down -v >"$logs/compose.log" 2>&1 || { tail -n 20 "$logs/compose.log" >&2; fail "compose down failed"; }
  # podman-compose leaves it behind.
  [ "$(cat "$run/engine")" = docker ] || engine network rm "hapax-${base}_default" >/dev/null 2>&1 || true
  rm -f "$run/engine" "$run/images"
}
