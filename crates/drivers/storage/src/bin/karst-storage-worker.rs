//! The worker of this crate's tests: programs of the host's table in a room of their own. The daemon has its own.

fn main() {
    let plan = std::env::args().next_back().unwrap_or_default();
    karst_host::sandbox::main(&plan, |_, _| 64)
}
