//! What an event costs in the pipeline with the memory broker and store: CPU time, throughput, allocations,
//! instructions, and the bytes of a remembered id.
//!
//! ```text
//! cargo bench -p hapax-benches --bench pipeline -- [NAME ..] [--events N] [--rounds R] [--json FILE]
//! cargo bench -p hapax-benches --bench pipeline --features count-allocations
//! cargo bench -p hapax-benches --bench pipeline --no-default-features   # the system's allocator instead of mimalloc
//! cargo bench -p hapax-benches --bench pipeline -- --callgrind [NAME ..]
//! ```

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Parser;
use hapax_benches::machine::{Machine, load};
use hapax_benches::report::{Figures, Spread};
use hapax_benches::{Cost, Plan, allocated, consume, noop, remember, topic};
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
    /// Counts instructions by valgrind's callgrind instead of measuring time.
    #[arg(long)]
    callgrind: bool,
    /// Writes the figures here too.
    #[arg(long)]
    json: Option<PathBuf>,
    /// What callgrind counts: one case, once.
    #[arg(long, hide = true)]
    counted: Option<String>,
    /// Publishes what would be consumed, to be taken off.
    #[arg(long, hide = true)]
    publish_only: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// One line of the report.
struct Case {
    name: &'static str,
    handlers: usize,
    in_flight: usize,
    keys: usize,
    remembered: usize,
}

const CASES: &[Case] = &[
    Case { name: "memory-64", handlers: 64, in_flight: 64, keys: 0, remembered: 0 },
    Case { name: "memory-256", handlers: 256, in_flight: 256, keys: 0, remembered: 10_000 },
    Case { name: "memory-1024", handlers: 1_024, in_flight: 1_024, keys: 0, remembered: 0 },
    Case { name: "memory-256-remembering-10m", handlers: 256, in_flight: 256, keys: 0, remembered: 10_000_000 },
    Case { name: "memory-256-per-key", handlers: 256, in_flight: 256, keys: 1_024, remembered: 0 },
    // A delivery of each key in flight: most of them wait for a handler.
    Case { name: "memory-1024-per-key", handlers: 256, in_flight: 1_024, keys: 1_024, remembered: 0 },
    Case { name: "memory-one-key", handlers: 256, in_flight: 256, keys: 1, remembered: 0 },
];

/// Ids whose bytes are counted.
const COUNTED_IDS: usize = 1_000_000;

impl Case {
    fn plan(&self, events: usize) -> Plan {
        let plan =
            Plan::of(if self.keys == 1 { events / 4 } else { events }, self.in_flight).with_handlers(self.handlers);
        if self.keys == 0 { plan } else { plan.in_order(self.keys) }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(case) = &arguments.counted {
        return run_counted(case, &arguments);
    }
    println!("{}", Machine::this());
    let wanted = |name: &str| arguments.names.is_empty() || arguments.names.iter().any(|part| name.contains(&**part));
    let cases = CASES.iter().filter(|case| wanted(case.name));
    let mut figures = Figures::default();
    if arguments.callgrind {
        for case in cases.filter(|case| case.remembered < 1_000_000) {
            if let Err(why) = instructions(case, &mut figures) {
                eprintln!("{why}");
                return ExitCode::FAILURE;
            }
        }
    } else {
        println!("medians of {} rounds of {} events, 256 B each", arguments.rounds, arguments.events);
        println!("{:<28} {:>26} {:>22} {:>12}", "case", "cpu us/event (min..max)", "events/s (median)", "allocations");
        cases.for_each(|case| print(case.name, &run(case, &arguments), &mut figures));
        if wanted("memory-bytes") {
            bytes_of_an_id(&mut figures);
        }
    }
    println!("load average at the end: {}", load());
    figures.write(arguments.json.as_deref()).expect("the figures' file");
    ExitCode::SUCCESS
}

fn print(name: &str, costs: &[Cost], figures: &mut Figures) {
    let cpu = Spread::of(costs.iter().map(|cost| cost.cpu_us));
    let rate = Spread::of(costs.iter().map(|cost| cost.events_per_second));
    let allocations = costs.iter().filter_map(|cost| cost.allocations).min_by(f64::total_cmp);
    println!(
        "{name:<28} {:>10.2} ({:>5.2}..{:>5.2}) {:>22.0} {:>12}",
        cpu.median,
        cpu.least,
        cpu.most,
        rate.median,
        allocations.map_or("-".to_owned(), |count| format!("{count:.2}")),
    );
    figures.note(name, "cpu_us", cpu.median);
    figures.note(name, "events_per_second", rate.median);
    if let Some(allocations) = allocations {
        figures.note(name, "allocations", allocations);
    }
}

fn runtime(threads: usize) -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().expect("a runtime")
}

fn store() -> MemoryStore {
    MemoryStore::builder().records_max(20_000_000).build()
}

fn run(case: &Case, arguments: &Arguments) -> Vec<Cost> {
    let plan = case.plan(arguments.events);
    runtime(2).block_on(async {
        let store = store();
        remember(&store, case.remembered).await;
        let mut costs = Vec::new();
        for round in 0..arguments.rounds {
            costs.push(consume(&plan, store.clone(), round * plan.events, |builder| builder.on_any(noop)).await);
        }
        costs
    })
}

/// Bytes in use for each of many remembered ids.
fn bytes_of_an_id(figures: &mut Figures) {
    let name = "memory-bytes";
    let Some(before) = allocated::bytes() else {
        return println!("{name:<28} needs --features count-allocations");
    };
    let store = store();
    runtime(2).block_on(remember(&store, COUNTED_IDS));
    let after = allocated::bytes().unwrap_or_default();
    let bytes = after.saturating_sub(before) as f64 / COUNTED_IDS as f64;
    println!("{name:<28} {bytes:>10.1} bytes a remembered id, of {COUNTED_IDS}");
    figures.note(name, "bytes_per_id", bytes);
    drop(store);
}

/// Instructions an event: what twice as many events cost more, less what publishing them costs more.
fn instructions(case: &Case, figures: &mut Figures) -> Result<(), String> {
    const EVENTS: usize = 20_000;
    let more = |publish_only: bool| -> Result<f64, String> {
        let one = count(case.name, EVENTS, publish_only)?;
        Ok(count(case.name, 2 * EVENTS, publish_only)? as f64 - one as f64)
    };
    let consumed = case.plan(2 * EVENTS).events - case.plan(EVENTS).events;
    let per_event = (more(false)? - more(true)?) / consumed as f64;
    println!("{:<28} {per_event:>10.0} instructions an event", case.name);
    figures.note(case.name, "instructions", per_event);
    Ok(())
}

fn count(case: &str, events: usize, publish_only: bool) -> Result<u64, String> {
    let this = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(this);
    valgrind.args(["--counted", case, "--events", &events.to_string()]);
    valgrind.args(publish_only.then_some("--publish-only"));
    let output = valgrind.output().map_err(|error| format!("valgrind cannot be started: {error}"))?;
    let told = String::from_utf8_lossy(&output.stderr);
    let collected = told.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok());
    collected.filter(|_| output.status.success()).ok_or_else(|| format!("callgrind counted nothing:\n{told}"))
}

fn run_counted(name: &str, arguments: &Arguments) -> ExitCode {
    let Some(case) = CASES.iter().find(|case| case.name == name) else {
        eprintln!("there is no case {name}");
        return ExitCode::FAILURE;
    };
    // Looks seldom, since looking counts too.
    let plan = Plan { look: Duration::from_millis(20), ..case.plan(arguments.events) };
    // Callgrind runs one thread at a time: a second would only be counted looking for work.
    runtime(1).block_on(async {
        if arguments.publish_only {
            drop(topic(&plan, 0));
        } else {
            consume(&plan, store(), 0, |builder| builder.on_any(noop)).await;
        }
    });
    ExitCode::SUCCESS
}
