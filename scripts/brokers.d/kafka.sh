# Apache Kafka (KRaft) from Maven Central: one node that is broker and controller (kafka), or three of them (kafka3-1..3).

kafka_need() {
  need_program java default-jre-headless
  [ -d "$jars" ] || need_program mvn maven
}

# Once for all sets, and anew when the pom has changed.
jars=$cache/kafka-$(cksum <"$root/scripts/kafka/pom.xml" | cut -d ' ' -f 1)

kafka_jars() {
  local pom=$root/scripts/kafka/pom.xml output version
  version=$(java -version 2>&1 | sed -n 's/^[^"]*"\([0-9]*\).*/\1/p' | head -n 1)
  [ "${version:-0}" -ge 17 ] || fail "Kafka needs Java 17 or newer, and java is ${version:-unknown}"
  [ ! -d "$jars" ] || return 0
  note "fetching Apache Kafka from Maven Central (once)"
  mkdir -p "$cache"
  rm -rf "$jars.part"
  # A settings file of the user, mirrors included, is respected.
  output=$(mvn -B -q -f "$pom" org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies -DoutputDirectory="$jars.part" -DincludeScope=runtime 2>&1) ||
    { printf '%s\n' "$output" | tail -n 20 >&2; fail "maven could not fetch Kafka"; }
  mv "$jars.part" "$jars"
}

kafka_java() { # heap in MB: the words of the command, without the class
  java_command=(java "-Xms$1m" "-Xmx$1m" -cp "$jars/*" "-Dlog4j2.configurationFile=$root/scripts/kafka/log4j2.properties")
}

kafka_start() { # server
  local home=$data/$1 java_command users=()
  kafka_properties "$1" >"$home/server.properties"
  # A test that starts a server of its own lays these there beforehand: properties, of which the last holds, and users.
  [ ! -e "$home/own.properties" ] || cat "$home/own.properties" >>"$home/server.properties"
  [ ! -e "$home/own.users" ] || mapfile -t users < <(sed 's/^/--add-scram=/' "$home/own.users")
  if [ ! -e "$home/made" ]; then
    rm -rf "$home/log"
    mkdir -p "$logs"
    kafka_java 128
    "${java_command[@]}" kafka.tools.StorageTool format --ignore-formatted -t "$(kafka_cluster_id "$1")" \
      -c "$home/server.properties" ${users[@]+"${users[@]}"} >"$logs/$1-format.log" 2>&1 || { tail -n 20 "$logs/$1-format.log" >&2; fail "$1: the format failed"; }
    touch "$home/made"
  fi
  kafka_java 384
  launch "$1" "${java_command[@]}" kafka.Kafka "$home/server.properties"
}

# 16 bytes in base64: a client notices when it meets the other cluster.
kafka_cluster_id() { case $1 in kafka3-*) echo hapaxTestsCluster3Id0w ;; *) echo hapaxTestsClusterId00w ;; esac; }

kafka_properties() { # server
  local port controller node voters replicas proxied n
  port=$(port_of "$1")
  case $1 in
    kafka3-*)
      node=${1#kafka3-} replicas=3 controller=$((port + 3)) voters= proxied=
      for n in 1 2 3; do voters+="${voters:+,}$n@127.0.0.1:$((base + 194 + n))"; done
      ;;
    *) node=1 replicas=1 controller=$((base + 93)) voters=1@127.0.0.1:$((base + 93)) proxied=1 ;;
  esac
  printf '%s\n' "process.roles=broker,controller" "node.id=$node" "log.dirs=$data/$1/log" \
    "controller.quorum.voters=$voters" "controller.listener.names=CONTROLLER" "inter.broker.listener.name=PLAINTEXT"
  # A client that comes through a proxy is told the proxy's address, or it would go round it.
  printf '%s\n' "listeners=PLAINTEXT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$controller${proxied:+,PROXIED://127.0.0.1:$((base + 94))}" \
    "advertised.listeners=PLAINTEXT://127.0.0.1:$port${proxied:+,PROXIED://127.0.0.1:$((base + 95))}" \
    "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,PROXIED:PLAINTEXT"
  printf '%s\n' "auto.create.topics.enable=false" "default.replication.factor=$replicas" "min.insync.replicas=$(((replicas + 1) / 2))" \
    "offsets.topic.replication.factor=$replicas" "offsets.topic.num.partitions=5" \
    "transaction.state.log.replication.factor=$replicas" "transaction.state.log.min.isr=$(((replicas + 1) / 2))" \
    "transaction.state.log.num.partitions=5" \
    "share.coordinator.state.topic.replication.factor=$replicas" "share.coordinator.state.topic.min.isr=$(((replicas + 1) / 2))"
  # A killed node may register again after its session, 9 s by default.
  printf '%s\n' "broker.session.timeout.ms=3000" "broker.heartbeat.interval.ms=500"
  # Rebalances at the pace of tests. Under KIP-848 session and heartbeat are the server's to say; 45 s and 5 s by default.
  printf '%s\n' "group.initial.rebalance.delay.ms=0" \
    "group.consumer.min.session.timeout.ms=6000" "group.consumer.session.timeout.ms=6000" \
    "group.consumer.min.heartbeat.interval.ms=500" "group.consumer.heartbeat.interval.ms=1000"
}

kafka_ready() { # server: started to the end, and its port answers
  grep -q 'Kafka Server started' "$logs/$1.log" && timeout 2 bash -c 'exec 3<>"/dev/tcp/127.0.0.1/$1"' - "$(port_of "$1")"
}
