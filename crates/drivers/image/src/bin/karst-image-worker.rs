//! The worker as a program of its own, for this crate's tests; the daemon is its own worker.
#![allow(clippy::disallowed_methods)] // drivers and their tests are the real world

fn main() {
    match std::env::args().nth(1) {
        Some(plan) => karst_image::worker::main(&plan),
        None => std::process::exit(64),
    }
}
