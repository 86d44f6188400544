//! The daemon. Without a role it is the launcher, which starts, restarts and reaps the two others:
//!
//! | role | runs as | may |
//! |---|---|---|
//! | launcher | root, a few MB, one thread | make DIR and its sockets, start the others |
//! | control | user `karst`, no capabilities | front ends, engine, store; asks the host for the rest |
//! | host | root with the capabilities of [`privilege::HOST_CAPABILITIES`] | everything on the machine, for ids only |
//!
//! Guests belong to none of them but to their keepers: each of the three may end at any moment, and no guest notices.
#![allow(clippy::disallowed_methods)] // daemons live in the real world

mod control;
mod directory;
mod host;
mod launcher;
mod log_file;
mod logging;
mod node;
mod platform;
mod privilege;
mod purge;
mod refusing;
mod secret_key;
mod simulate;
mod state;

use clap::{Parser, Subcommand};
use std::{path::PathBuf, process::ExitCode};

#[derive(Debug, Parser)]
#[command(name = "karstd", version, about = "Karst: virtual machines and containers on this host")]
struct Arguments {
    /// Where this instance of the platform keeps everything.
    #[arg(long, env = "KARST_DIR", default_value = "/var/lib/karst", global = true)]
    dir: PathBuf,
    /// Form of the log on standard error; `KARST_LOG` (such as `debug`) says how much.
    #[arg(long, value_enum, default_value_t = logging::Format::Text, global = true)]
    log_format: logging::Format,
    /// Log into this file instead, which is cut when it is long: what was in it is in FILE.1 then.
    #[arg(long, value_name = "FILE", conflicts_with = "simulate")]
    log_file: Option<PathBuf>,
    /// How long that file may become.
    #[arg(long, value_name = "BYTES", default_value_t = 32 << 20)]
    log_file_size: u64,
    /// User of the control process.
    #[arg(long, default_value = "karst")]
    user: String,
    /// Simulate so many hosts, each for so many guests; needs no privileges and touches nothing of this machine but DIR.
    #[arg(long, value_name = "HOSTSxGUESTS", value_parser = simulate::Size::parse)]
    simulate: Option<simulate::Size>,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Starts, restarts and reaps the others.
    #[command(hide = true)]
    Launcher,
    /// Front ends, engine and store.
    #[command(hide = true)]
    Control(privilege::Inherited),
    /// The agent of this machine.
    #[command(hide = true)]
    Host(privilege::Inherited),
    /// Ends the daemon and its guests and removes every trace of them from this machine, DIR included.
    Purge {
        /// Seconds that the daemon has to end by itself before it is killed.
        #[arg(long, value_name = "SECONDS", default_value_t = purge::GRACE.as_secs())]
        grace: u64,
    },
}

/// Opens the launcher's log file, if there is to be one, and makes it standard error.
fn begin_log(arguments: &Arguments) -> std::io::Result<Option<log_file::LogFile>> {
    let launches = matches!(arguments.role, None | Some(Role::Launcher));
    let Some(path) = arguments.log_file.as_deref().filter(|_| launches) else { return Ok(None) };
    let log = log_file::LogFile::open(path, arguments.log_file_size)?;
    log.take_standard_error()?;
    Ok(Some(log))
}

fn main() -> ExitCode {
    // The image worker: its plan follows, and it must be alone in its process.
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some("image-worker") {
        karst_image::worker::main(&words.next().unwrap_or_default());
    }
    let arguments = Arguments::parse();
    let log = match begin_log(&arguments) {
        Ok(log) => log,
        Err(e) => {
            eprintln!(
                "karstd: the log file {:?} cannot be used: {e}",
                arguments.log_file.unwrap_or_default()
            );
            return ExitCode::FAILURE;
        }
    };
    logging::start(arguments.log_format);
    let outcome = match (&arguments.role, arguments.simulate) {
        (None | Some(Role::Launcher), Some(size)) => simulate::run(&arguments.dir, size),
        (None | Some(Role::Launcher), None) => {
            launcher::run(&arguments.dir, &arguments.user, arguments.log_format, log)
        }
        (Some(Role::Control(inherited)), _) => control::start(&arguments.dir, inherited),
        (Some(Role::Host(inherited)), _) => host::start(&arguments.dir, inherited),
        (Some(Role::Purge { grace }), _) => {
            purge::run(&arguments.dir, std::time::Duration::from_secs(*grace))
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!(context = e.context.as_deref(), "{e}");
            if matches!(arguments.role, Some(Role::Control(_) | Role::Host(_))) {
                // The launcher's to read: what it tells clients meanwhile.
                println!("{e}");
            }
            ExitCode::FAILURE
        }
    }
}
