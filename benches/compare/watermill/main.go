// Watermill on Kafka, with and without its in-memory deduplicator: its router, its default marshaler, one handler that
// does nothing. It takes the arguments of every contender and ends with the same line.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/IBM/sarama"
	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill-kafka/v3/pkg/kafka"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
)

const sentAt = len(`{"sent":"`)

type meter struct {
	wanted  int64
	latency bool
	handled atomic.Int64
	ready   atomic.Bool
	first   time.Time
	mu      sync.Mutex
	waited  []float64
	all     chan struct{}
}

func (m *meter) handle(payload []byte) {
	var sent int64
	if m.latency {
		if len(payload) >= sentAt+16 {
			sent, _ = strconv.ParseInt(string(payload[sentAt:sentAt+16]), 10, 64)
		}
		if sent == 0 {
			if !m.ready.Swap(true) {
				fmt.Println("ready")
			}
			return
		}
		waited := float64(time.Now().UnixMicro()-sent) / 1000
		m.mu.Lock()
		m.waited = append(m.waited, waited)
		m.mu.Unlock()
	}
	now := m.handled.Add(1)
	if now == 1 {
		m.mu.Lock()
		m.first = time.Now()
		m.mu.Unlock()
	}
	if now == m.wanted {
		close(m.all)
	}
}

type outcome struct {
	Events   int64    `json:"events"`
	Seconds  float64  `json:"seconds"`
	CPU      float64  `json:"cpu_us_per_event"`
	PeakMiB  float64  `json:"peak_mib"`
	P50      *float64 `json:"p50_ms"`
	P99      *float64 `json:"p99_ms"`
	StoreMiB *float64 `json:"store_mib"`
}

func (m *meter) report() {
	m.mu.Lock()
	defer m.mu.Unlock()
	var usage syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &usage)
	micros := float64(usage.Utime.Sec+usage.Stime.Sec)*1e6 + float64(usage.Utime.Usec+usage.Stime.Usec)
	events := m.handled.Load()
	o := outcome{Events: events, Seconds: time.Since(m.first).Seconds(), CPU: micros / float64(events), PeakMiB: peakMiB()}
	if len(m.waited) > 0 {
		sort.Float64s(m.waited)
		p50, p99 := m.waited[(len(m.waited)-1)/2], m.waited[(len(m.waited)-1)*99/100]
		o.P50, o.P99 = &p50, &p99
	}
	line, _ := json.Marshal(o)
	fmt.Println(string(line))
}

func peakMiB() float64 {
	status, _ := os.ReadFile("/proc/self/status")
	for _, line := range strings.Split(string(status), "\n") {
		if rest, found := strings.CutPrefix(line, "VmHWM:"); found {
			kib, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kib / 1024
		}
	}
	return 0
}

func main() {
	url := flag.String("url", "", "")
	topic := flag.String("topic", "", "")
	group := flag.String("group", "", "")
	store := flag.String("store", "none", "")
	events := flag.Int64("events", 0, "")
	latency := flag.Bool("latency", false, "")
	// Given to every contender, and of no use to this one.
	for _, name := range []string{"contender", "broker", "store-url", "concurrency", "in-flight", "batch", "order", "level"} {
		flag.String(name, "", "")
	}
	flag.Parse()
	m := &meter{wanted: *events, latency: *latency, all: make(chan struct{})}

	config := kafka.DefaultSaramaSubscriberConfig()
	config.Consumer.Offsets.Initial = sarama.OffsetOldest
	subscriber, err := kafka.NewSubscriber(kafka.SubscriberConfig{
		Brokers:               []string{strings.TrimPrefix(*url, "kafka://")},
		Unmarshaler:           kafka.DefaultMarshaler{},
		OverwriteSaramaConfig: config,
		ConsumerGroup:         *group,
	}, watermill.NopLogger{})
	if err != nil {
		log.Fatal(err)
	}
	router, err := message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
	if err != nil {
		log.Fatal(err)
	}
	if *store == "memory" {
		repository, err := middleware.NewMapExpiringKeyRepository(time.Hour)
		if err != nil {
			log.Fatal(err)
		}
		deduplicator := &middleware.Deduplicator{
			KeyFactory: func(msg *message.Message) (string, error) { return msg.Metadata.Get("ce_id"), nil },
			Repository: repository,
			Timeout:    time.Second,
		}
		router.AddMiddleware(deduplicator.Middleware)
	}
	router.AddNoPublisherHandler("measured", *topic, subscriber, func(msg *message.Message) error {
		m.handle(msg.Payload)
		return nil
	})
	go func() {
		if err := router.Run(context.Background()); err != nil {
			log.Fatal(err)
		}
	}()
	<-m.all
	m.report()
	_ = router.Close()
}
