# RabbitMQ with an Erlang port mapper (epmd) of its own: all folders, the cookie and the ports are the set's, whoever runs it.

rabbitmq_need() { need_program rabbitmq-server rabbitmq-server; }

rabbitmq_environment() {
  local home=$data/rabbitmq
  export HOME=$home
  export RABBITMQ_NODENAME="hapax-$base@localhost" RABBITMQ_DIST_PORT=$((base + 673))
  export RABBITMQ_MNESIA_BASE=$home/mnesia RABBITMQ_LOG_BASE=$home/log RABBITMQ_LOGS=- RABBITMQ_GENERATED_CONFIG_DIR=$home/config
  export RABBITMQ_CONFIG_FILE=$home/rabbitmq.conf RABBITMQ_ENABLED_PLUGINS_FILE=$home/enabled_plugins
  export RABBITMQ_CONF_ENV_FILE=/dev/null RABBITMQ_PID_FILE=$home/rabbitmq.pid
  # Loopback only, the distribution and its port mapper too.
  export ERL_EPMD_ADDRESS=127.0.0.1 ERL_EPMD_PORT=$((base + 369))
  export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="-kernel inet_dist_use_interface {127,0,0,1}"
  export ERL_CRASH_DUMP_SECONDS=0
  # The start script then becomes the server, instead of a shell that watches it.
  export RUNNING_UNDER_SYSTEMD=1
}

rabbitmq_start() { # server
  local home=$data/rabbitmq
  mkdir -p "$home/mnesia" "$home/log" "$home/config"
  printf '[].\n' >"$home/enabled_plugins"
  # The user is made with the first start, before the port opens.
  printf '%s\n' "listeners.tcp.1 = 127.0.0.1:$(port_of rabbitmq)" "default_user = hapax" "default_pass = hapax" \
    "default_user_tags.administrator = true" "disk_free_limit.absolute = 50MB" "vm_memory_high_watermark.absolute = 1GB" \
    "log.console.level = info" >"$home/rabbitmq.conf"
  (
    rabbitmq_environment
    if ! pid_of epmd >/dev/null; then
      mkdir -p "$data/epmd"
      launch epmd epmd -address 127.0.0.1 -port "$ERL_EPMD_PORT"
    fi
    launch rabbitmq "$(program_path rabbitmq-server)"
  )
}

# A broker that speaks: it answers the header of AMQP 0-9-1 with the method connection.start (class 10, method 10).
rabbitmq_ready() {
  timeout 2 bash -c '
    exec 3<>"/dev/tcp/127.0.0.1/$1" && printf "AMQP\0\0\x09\x01" >&3 &&
    [ "$(head -c 11 <&3 | od -An -tx1 -j7 | tr -d " ")" = 000a000a ]' - "$(port_of rabbitmq)"
}

rabbitmqctl_of_set() { # arguments
  (
    rabbitmq_environment
    exec "$(program_path rabbitmqctl)" "$@"
  )
}
