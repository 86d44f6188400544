//! The program: finds its port, answers the host, one thread for each stream.
//!
//! Everything that can block (a dead network file system, a frozen disk) blocks its own stream only. A fault in a stream
//! ends that stream. The host going away ends all of them, and the programs they run.

mod exec;
mod facts;
mod files;
mod freeze;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod mount;
mod mux;
mod port;
mod power;
mod replace;
mod users;

pub use port::Port;

use crate::message::{Reply, Request, Wire, refusal};
use mux::{Mux, Stream};
use std::{
    panic::AssertUnwindSafe,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

pub(crate) use crate::message::Refused;

/// Most threads of streams, also of connections before that hang in the kernel.
const MAX_THREADS: usize = 2 * crate::wire::MAX_STREAMS;
const STACK: usize = 256 << 10;
const HELP: &str = "karst-guest-agent: answers the host of this virtual machine on its virtio-serial port.\n\
    Without arguments it serves the port named org.karst.agent.0; --listen PATH serves a unix socket instead (for tests).";

/// A refusal.
pub(crate) fn refused(code: u8, field: &str, text: impl ToString) -> Refused {
    Refused { code, field: field.to_owned(), text: text.to_string() }
}

/// A refusal for an error of the system.
pub(crate) fn failed(e: impl Into<std::io::Error>) -> Refused {
    let e = e.into();
    let code = match e.raw_os_error() {
        Some(libc::ENOENT) => refusal::NOT_FOUND,
        Some(libc::EEXIST) => refusal::EXISTS,
        Some(libc::ENOTEMPTY) => refusal::NOT_EMPTY,
        Some(libc::EISDIR) => refusal::IS_DIRECTORY,
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => refusal::NO_SPACE,
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENXIO) => refusal::UNSUPPORTED,
        Some(libc::EROFS | libc::EPERM | libc::EACCES) => refusal::DENIED,
        Some(libc::ENAMETOOLONG | libc::ELOOP | libc::ENOTDIR | libc::EINVAL) => refusal::INVALID,
        Some(libc::EBUSY | libc::EMFILE | libc::ENFILE | libc::EAGAIN) => refusal::BUSY,
        _ => refusal::FAILED,
    };
    refused(code, "", e)
}

/// The program's `main`.
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let port = match (arguments.next(), arguments.next(), arguments.next()) {
        (None, ..) => Port::Named(crate::PORT),
        (Some(flag), Some(path), None) if flag == "--listen" => match port::listen(path.as_ref()) {
            Ok(listener) => Port::Socket(listener),
            Err(e) => {
                eprintln!("cannot listen on {}: {e}", path.display());
                return ExitCode::FAILURE;
            }
        },
        (Some(flag), None, None) if flag == "--version" => {
            println!("karst-guest-agent {} protocol {}", env!("CARGO_PKG_VERSION"), crate::wire::VERSION);
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{HELP}");
            return ExitCode::from(2);
        }
    };
    // SAFETY: plain calls. What it makes is for others to read unless it says otherwise.
    unsafe {
        libc::umask(0o022);
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    }
    serve(port)
}

/// Serves the port until the process ends.
pub fn serve(mut port: Port) -> ! {
    let mux = Arc::new(Mux::default());
    let mut told = false;
    let mut complaint = String::new();
    loop {
        match port.open() {
            Ok(fd) => {
                complaint.clear();
                if !std::mem::replace(&mut told, true) {
                    notify_started();
                }
                mux.serve(fd, &port, start);
            }
            Err(e) => {
                // The service manager waits for a word, and a machine without the port is no failure.
                if !std::mem::replace(&mut told, true) {
                    notify_started();
                }
                let text = e.to_string();
                if text != complaint {
                    eprintln!("waiting for the port: {text}");
                    complaint = text;
                }
                std::thread::sleep(Duration::from_millis(500));
            }
        }
    }
}

/// systemd's `sd_notify(3)`: one datagram.
fn notify_started() {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    use std::os::{linux::net::SocketAddrExt, unix::ffi::OsStrExt, unix::net};
    let address = match path.as_bytes() {
        [b'@', name @ ..] => net::SocketAddr::from_abstract_name(name),
        _ => net::SocketAddr::from_pathname(&path),
    };
    let sent = address
        .and_then(|a| net::UnixDatagram::unbound()?.send_to_addr(b"READY=1\nSTATUS=Serving the host", &a));
    if let Err(e) = sent {
        eprintln!("the service manager could not be told: {e}");
    }
}

static THREADS: AtomicUsize = AtomicUsize::new(0);

/// Gives back a thread's place.
struct Place;

impl Drop for Place {
    fn drop(&mut self) {
        THREADS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Answers a new stream in a thread of its own.
fn start(stream: Arc<Stream>, request: Request) {
    let refuse = |stream: &Stream, text: &str| {
        stream.reply(&Reply::<crate::message::Nothing>(Err(refused(refusal::BUSY, "", text))));
        stream.finished();
    };
    if THREADS.fetch_add(1, Ordering::Relaxed) >= MAX_THREADS {
        drop(Place);
        return refuse(&stream, "too much is going on in the guest at once");
    }
    let place = Place;
    let kept = stream.clone();
    let thread = std::thread::Builder::new().stack_size(STACK).spawn(move || {
        let _place = place;
        if std::panic::catch_unwind(AssertUnwindSafe(|| answer(&stream, request))).is_err() {
            let fault = refused(refusal::FAILED, "", "the agent failed; see its log");
            stream.reply(&Reply::<crate::message::Nothing>(Err(fault)));
        }
        stream.finished();
    });
    if thread.is_err() {
        refuse(&kept, "the guest has no room for another thread");
    }
}

fn answer(stream: &Stream, request: Request) {
    fn once<T: Wire>(stream: &Stream, result: Result<T, Refused>) {
        stream.reply(&Reply(result));
    }
    let streamed = |result: Result<(), Refused>| {
        if let Err(r) = result {
            stream.fail(r);
        }
    };
    match request {
        Request::Info(_) => once(stream, facts::info()),
        Request::Interfaces(_) => once(stream, facts::interfaces()),
        Request::Figures(_) => once(stream, facts::figures()),
        Request::Exec(exec) => streamed(exec::run(stream, exec)),
        Request::Open(path) => streamed(files::open(stream, &path.path)),
        Request::Write(write) => streamed(files::write(stream, write)),
        Request::Delete(path) => once(stream, files::delete(&path.path)),
        Request::Freeze(how) => once(stream, freeze::freeze(how)),
        Request::Thaw(_) => once(stream, freeze::thaw()),
        Request::SetTime(time) => once(stream, power::set_time(time)),
        Request::Mount(directory) => once(stream, mount::mount(&directory, mount::Kind::Plan9)),
        Request::MountVirtiofs(directory) => once(stream, mount::mount(&directory, mount::Kind::Virtiofs)),
        Request::Shutdown(how) => match power::plan(how) {
            Ok(plan) => {
                stream.reply(&Reply(Ok(crate::message::Nothing {})));
                if let Err(e) = plan.carry_out() {
                    eprintln!("the system could not be shut down: {}", e.text);
                }
            }
            Err(r) => once::<crate::message::Nothing>(stream, Err(r)),
        },
    }
}
