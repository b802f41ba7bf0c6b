//! What an event costs in the pipeline: CPU time, allocations, and throughput, with the memory broker.
//!
//! ```text
//! cargo bench -p hapax-benches --bench pipeline -- [NAME ..] [--events N] [--rounds R]
//! cargo bench -p hapax-benches --bench pipeline --features count-allocations
//! ```

use clap::Parser;
use hapax_benches::{Cost, Plan, consume};
use hapax_memory::MemoryStore;

/// Measures the pipeline.
#[derive(Parser)]
struct Arguments {
    /// Only cases whose name holds one of these.
    names: Vec<String>,
    /// Events a round.
    #[arg(long, default_value_t = 200_000)]
    events: usize,
    /// Rounds a case; the median is printed, with the smallest and the largest.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// One line of the report.
struct Case {
    name: &'static str,
    in_flight: usize,
    keys: usize,
    remembered: usize,
}

const CASES: &[Case] = &[
    Case { name: "memory-64", in_flight: 64, keys: 0, remembered: 0 },
    Case { name: "memory-256", in_flight: 256, keys: 0, remembered: 10_000 },
    Case { name: "memory-1024", in_flight: 1_024, keys: 0, remembered: 0 },
    Case { name: "memory-256-remembering-10m", in_flight: 256, keys: 0, remembered: 10_000_000 },
    Case { name: "memory-256-per-key", in_flight: 256, keys: 1_024, remembered: 0 },
    Case { name: "memory-one-key", in_flight: 256, keys: 1, remembered: 0 },
];

fn main() {
    let arguments = Arguments::parse();
    println!("{:<28} {:>26} {:>22} {:>12}", "case", "cpu us/event (min..max)", "events/s (median)", "allocations");
    for case in CASES {
        if !arguments.names.is_empty() && !arguments.names.iter().any(|name| case.name.contains(name.as_str())) {
            continue;
        }
        let mut costs = run(case, &arguments);
        costs.sort_by(|a, b| a.cpu_us.total_cmp(&b.cpu_us));
        let (median, least, most) = (costs[costs.len() / 2], costs[0], costs[costs.len() - 1]);
        println!(
            "{:<28} {:>10.2} ({:>5.2}..{:>5.2}) {:>22.0} {:>12}",
            case.name,
            median.cpu_us,
            least.cpu_us,
            most.cpu_us,
            median.events_per_second,
            median.allocations.map_or("-".to_owned(), |count| format!("{count:.2}")),
        );
    }
}

fn run(case: &Case, arguments: &Arguments) -> Vec<Cost> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let events = if case.keys == 1 { arguments.events / 4 } else { arguments.events };
    let plan = Plan { events, in_flight: case.in_flight, bytes: 256, keys: case.keys };
    runtime.block_on(async {
        let store = MemoryStore::builder().records_max(20_000_000).build();
        hapax_benches::remember(&store, case.remembered).await;
        let mut costs = Vec::new();
        for round in 0..arguments.rounds {
            costs.push(consume(&plan, store.clone(), round * events).await);
        }
        costs
    })
}
