//! The simulator as a test: a million steps without a violation, and the same bytes from the same seed.
#![allow(clippy::print_stderr)]

use lmserve::sim::simulate;

#[test]
fn a_million_steps_break_no_promise() {
    let report = simulate(1, 1_000_000).unwrap();
    eprintln!("{report:?}");
    let (counters, faults) = (report.counters.entries(), report.faults.entries());
    for (name, count) in counters.into_iter().chain(faults) {
        assert!(count > 100, "the simulator hardly tried {name}: {report:?}");
    }
}

#[test]
fn one_seed_replays_byte_for_byte() {
    let first = simulate(7, 10_000).unwrap();
    assert_eq!(first, simulate(7, 10_000).unwrap());
    assert_ne!(first.digest, simulate(8, 10_000).unwrap().digest);
}
