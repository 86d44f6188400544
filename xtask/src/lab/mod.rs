//! `cargo xtask lab`: guests of QEMU with a distribution's stock kernel, in which Karst itself runs.
//!
//! For what the machine below may lack (pure cgroup v2, AppArmor, device mapper, VLANs, a watchdog, `/dev/kvm`) and for
//! reboots and power cuts. It proves function, never time: the guest is emulated. Images are cached by their recipe, each
//! guest has an overlay of its own, ends by itself after a limit, and `down` leaves nothing but the image.

mod guest;
mod image;
mod volatile;

use crate::root;
use clap::{Args, Subcommand};
use guest::Guest;
use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// What went wrong, for the one who called.
pub type Result<T> = std::result::Result<T, String>;

/// Guests of QEMU in which Karst runs.
#[derive(Args)]
pub struct Lab {
    /// Which guest; several may run beside each other.
    #[arg(long, default_value = "lab", global = true, env = "KARST_LAB_NAME")]
    name: String,
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Makes the image of a variant if it is not there, and prints where it lies.
    Image {
        /// One of those in tests/lab/image.
        variant: String,
    },
    /// Boots a guest, or one that lost its power; ready when this returns.
    Up(Up),
    /// Runs a command in it as root, with this process' standard streams; answers its exit code (124: out of time).
    Run {
        /// Seconds until it is given up.
        #[arg(long, default_value_t = 600)]
        timeout: u64,
        /// The command and its arguments, as they are.
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<String>,
    },
    /// Copies files into it.
    Put {
        /// What to copy, directories as a whole.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Directory in the guest.
        #[arg(long, default_value = "/root")]
        to: String,
    },
    /// Waits until it has booted another time than ID (`/proc/sys/kernel/random/boot_id`).
    AwaitReboot {
        /// What the file said before.
        id: String,
        /// Seconds until it is given up.
        #[arg(long, default_value_t = 240)]
        timeout: u64,
    },
    /// Ends its QEMU at once. Its disk stays as it is (with `up --volatile`: as it was flushed last); `up` boots it again.
    PowerCut,
    /// Ends it and removes its disk.
    Down,
    /// Which guests run.
    Status,
    /// What it printed on its console.
    Console,
    /// Runs tests/lab/suites/NAME and removes the guest that it left.
    Suite {
        /// Name of the suite; without one they are listed.
        suite: Option<String>,
    },
}

/// How to boot.
#[derive(Args)]
pub struct Up {
    /// Variant of the image.
    #[arg(long, default_value = "bookworm")]
    variant: String,
    /// Memory, MiB.
    #[arg(long, default_value_t = 3072)]
    memory: u32,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Seconds after which the guest is ended, whoever forgot it.
    #[arg(long, default_value_t = 14400)]
    limit: u64,
    /// Crates whose test programs go to /lab/tests/CRATE-NAME.
    #[arg(long = "tests")]
    tests: Vec<String>,
    /// Further files for /lab/files.
    #[arg(long = "file")]
    files: Vec<PathBuf>,
    /// A disk with a cache that forgets: what was not flushed is lost by a power cut.
    #[arg(long)]
    volatile: bool,
    /// Further empty disks of so many GiB (`/dev/vdc` and on).
    #[arg(long = "disk")]
    disks: Vec<u32>,
}

/// Runs it; the exit code.
pub fn run(lab: Lab) -> u8 {
    match act(lab) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("lab: {e}");
            1
        }
    }
}

fn act(lab: Lab) -> Result<u8> {
    let guest = Guest::named(&lab.name)?;
    match lab.task {
        Task::Image { variant } => println!("{}", image::ensure(&variant)?.display()),
        Task::Up(up) => guest.up(&up)?,
        Task::Run { timeout, command } => return guest.run(&command, timeout),
        Task::Put { files, to } => guest.put(&files, &to)?,
        Task::AwaitReboot { id, timeout } => guest.await_reboot(&id, timeout)?,
        Task::PowerCut => guest.end()?,
        Task::Down => guest.remove()?,
        Task::Status => guest::list()?,
        Task::Console => print!("{}", guest.console()),
        Task::Suite { suite: None } => {
            let dir = root().join("tests/lab/suites");
            let entries = std::fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
            let mut names: Vec<_> = entries.flatten().map(|e| e.file_name()).collect();
            names.sort();
            names.iter().for_each(|n| println!("{}", n.display()));
        }
        Task::Suite { suite: Some(suite) } => return run_suite(&suite),
    }
    Ok(0)
}

fn run_suite(suite: &str) -> Result<u8> {
    let script = root().join("tests/lab/suites").join(suite);
    if suite.contains('/') || !script.is_file() {
        return Err(format!("there is no suite {suite:?}; `cargo xtask lab suite` lists them"));
    }
    let name = format!("suite-{suite}-{}", std::process::id());
    let guest = Guest::named(&name)?;
    let this = std::env::current_exe().map_err(|e| e.to_string())?;
    let status = Command::new(&script)
        .env("KARST_LAB", this)
        .env("KARST_LAB_NAME", &name)
        .current_dir(root())
        .status()
        .map_err(|e| format!("{}: {e}", script.display()))?;
    if !status.success() {
        let console = guest.console();
        let tail: Vec<_> = console.lines().rev().take(15).collect();
        eprintln!("the last lines of the guest's console:");
        tail.iter().rev().for_each(|l| eprintln!("  {l}"));
    }
    guest.remove()?;
    Ok(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1))
}

/// Where the lab keeps its things.
fn lab_dir() -> PathBuf {
    target().join("lab")
}

/// Cargo's target directory.
fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

fn mkdir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))
}

/// Runs a program to its end; its standard output, or what it complained about.
fn output(program: &str, arguments: &[&str], dir: &Path) -> Result<String> {
    let out = Command::new(program)
        .args(arguments)
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("{program}: {e}"))?;
    if !out.status.success() {
        return Err(format!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&out.stderr)));
    }
    Ok(String::from_utf8_lossy(&out.stdout).trim_end().to_owned())
}

/// Waits until `done`, at most so long.
fn wait_for(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < limit {
        if done() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    false
}
