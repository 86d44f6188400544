//! Repository tasks: `cargo xtask check|tidy|gen|corpus|lab`.
#![allow(clippy::disallowed_methods)] // a tool

mod generate;
mod lab;
mod pages;
mod tidy;

use clap::{Parser, Subcommand};
use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

/// Repository tasks.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Everything that is quick: formatting, clippy, tidy, generated documents up to date.
    Check,
    /// Dependency edges, file headers and sizes, where programs may be executed.
    Tidy,
    /// Writes generated documents; `--check` only compares.
    Gen {
        /// Fails when a document is stale instead of writing it.
        #[arg(long)]
        check: bool,
    },
    /// Counts which of libvirt's domain documents are accepted and shown again in meaning; writes docs/reference/libvirt-corpus.md.
    Corpus {
        /// Directory of the documents: tests/qemuxml2argvdata of libvirt's source package (`apt-get source libvirt`).
        directory: PathBuf,
    },
    /// Guests of QEMU with a stock kernel in which Karst itself runs.
    Lab(lab::Lab),
}

/// Root of the repository.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository").to_owned()
}

fn cargo(arguments: &[&str]) -> bool {
    eprintln!("cargo {}", arguments.join(" "));
    Command::new(env!("CARGO")).args(arguments).current_dir(root()).status().is_ok_and(|s| s.success())
}

/// The documents are tried by a test of the front end, which has an engine with a simulated host.
fn corpus(directory: &Path) -> bool {
    let directory = match directory.canonicalize() {
        Ok(directory) => directory,
        Err(e) => {
            eprintln!("{}: {e}", directory.display());
            return false;
        }
    };
    let test = ["test", "--package", "karst-frontend-libvirt", "--test", "all", "corpus::libvirts_documents"];
    Command::new(env!("CARGO"))
        .args(test)
        .args(["--", "--exact", "--ignored", "--nocapture"])
        .env("KARST_LIBVIRT_CORPUS", directory)
        .current_dir(root())
        .status()
        .is_ok_and(|s| s.success())
}

fn report(name: &str, faults: &[String]) -> bool {
    for fault in faults {
        eprintln!("{name}: {fault}");
    }
    faults.is_empty()
}

fn main() -> ExitCode {
    let ok = match Cli::parse().task {
        Task::Check => {
            let formatted = cargo(&["fmt", "--all", "--check"]);
            let clippy = cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]);
            formatted & clippy & report("tidy", &tidy::faults()) & report("gen", &generate::run(true))
        }
        Task::Tidy => report("tidy", &tidy::faults()),
        Task::Gen { check } => report("gen", &generate::run(check)),
        Task::Corpus { directory } => corpus(&directory),
        Task::Lab(lab) => return ExitCode::from(lab::run(lab)),
    };
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
