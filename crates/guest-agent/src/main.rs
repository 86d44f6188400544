//! `karst-guest-agent`: see the library.

fn main() -> std::process::ExitCode {
    karst_guest_agent::agent::main()
}
