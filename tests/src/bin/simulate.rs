//! `simulate`: runs any number of seeds of the simulation and tells which of them break an invariant.
//!
//! `cargo run --release -p hapax-testkit --bin simulate -- --seeds 100000 --from 0`

use std::io::Write;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use hapax_testkit::simulation::{Report, simulate};
use tokio::time::Instant;

const USAGE: &str = "simulate [--seeds N] [--from SEED] [--threads N] [--failures N] [--trace] [--plan]

  --seeds N     how many seeds to run (1000)
  --from SEED   the first of them (0)
  --threads N   at the same time (as many as there are cores)
  --failures N  stop after so many seeds that failed (5)
  --trace       print every line of each history, as JSON
  --plan        print what each seed drew";

struct Options {
    seeds: u64,
    from: u64,
    threads: usize,
    failures: usize,
    trace: bool,
    plan: bool,
}

fn options() -> Result<Options, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut options = Options { seeds: 1_000, from: 0, threads, failures: 5, trace: false, plan: false };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || -> Result<u64, String> {
            let value = args.next().ok_or_else(|| format!("{arg} needs a number"))?;
            value.parse().map_err(|_| format!("{arg} {value}: not a number"))
        };
        match arg.as_str() {
            "--seeds" => options.seeds = number()?,
            "--from" => options.from = number()?,
            "--threads" => options.threads = number()?.clamp(1, 256) as usize,
            "--failures" => options.failures = number()?.max(1) as usize,
            "--trace" => options.trace = true,
            "--plan" => options.plan = true,
            _ => return Err(format!("{arg} is not known")),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(why) => {
            eprintln!("{why}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let begun = Instant::now();
    let (next, failed) = (AtomicU64::new(0), AtomicUsize::new(0));
    let output = Mutex::new(std::io::stdout());
    std::thread::scope(|scope| {
        for _ in 0..options.threads {
            scope.spawn(|| {
                while failed.load(Ordering::Relaxed) < options.failures {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= options.seeds {
                        break;
                    }
                    let report = simulate(options.from.wrapping_add(n));
                    failed.fetch_add(usize::from(!report.is_clean()), Ordering::Relaxed);
                    tell(&options, &report, &output);
                }
            });
        }
    });
    let ran = next.into_inner().min(options.seeds);
    let failed = failed.into_inner();
    let seconds = begun.elapsed().as_secs_f64();
    let summary = format!("{ran} seeds from {} in {seconds:.1} s, {failed} failed\n", options.from);
    write(&output, &summary);
    ExitCode::from(u8::from(failed > 0))
}

fn tell(options: &Options, report: &Report, output: &Mutex<std::io::Stdout>) {
    let mut text = String::new();
    if options.plan {
        text += report.plan();
        text += "\n";
    }
    if options.trace {
        text += &report.ledger.to_jsonl();
    }
    if !report.is_clean() {
        text += &report.to_string();
    }
    write(output, &text);
}

fn write(output: &Mutex<std::io::Stdout>, text: &str) {
    if let Ok(mut output) = output.lock() {
        // A reader that has gone has seen enough.
        let _ = output.write_all(text.as_bytes());
    }
}
