//! `karst`, the command line of Karst. It speaks the API of the server's unix socket and nothing else; the parts are
//! `client` (transport, operations, websockets), `commands` (a file for each family) and `output`.
#![allow(clippy::disallowed_methods)] // a program of the user: its clock, tasks and waits are real

mod cli;
mod client;
mod commands;
mod context;
mod editor;
mod error;
mod output;
mod password;
mod terminal;

fn main() {
    let code = match cli::main() {
        Ok(()) => 0,
        Err(error) => {
            error::report(&error);
            error.exit_code()
        }
    };
    // Threads that wait for stdin must not keep the process.
    std::process::exit(code);
}
