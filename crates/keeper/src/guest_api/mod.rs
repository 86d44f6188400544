//! `karst-keeper --guest-api`: the API that a guest finds at `/dev/incus/sock` and `/dev/lxd/sock`, for this guest alone.
//!
//! Descriptor 3 is the socket it listens at, 4 the directory with the guest's data ([`karst_keeper::guest_data`]). It runs as
//! the host's id of the guest's root without a right, and confines itself to that directory and to the calls that it
//! needs before it listens to anybody: a guest that took it over would have gained nothing but its own data.
//!
//! Protocol: Incus' guest API 1.0 (`doc/dev-incus.md`).

mod confine;
mod events;
mod http;

use events::Events;
use http::{Request, Response, quote};
use karst_keeper::guest_data::{self, GuestData};
use std::{
    fs::File,
    io::{Read, Write},
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

/// Connections at a time; more are closed at once.
const MOST: usize = 32;
const STACK: usize = 128 * 1024;
/// How long a connection may say nothing.
const IDLE: Duration = Duration::from_secs(60);

/// The directory with the data.
pub(crate) struct Data {
    dir: OwnedFd,
}

impl Data {
    fn open(&self, name: &str, write: bool) -> std::io::Result<File> {
        use rustix::fs::{Mode, OFlags, openat};
        let mode = if write { OFlags::WRONLY | OFlags::TRUNC } else { OFlags::RDONLY };
        let flags = mode | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(openat(&self.dir, name, flags, Mode::empty())?.into())
    }

    /// What is there now.
    pub(crate) fn read(&self) -> Result<GuestData, String> {
        let mut content = vec![];
        let file = self.open(guest_data::FILE, false).map_err(|e| e.to_string())?;
        file.take(guest_data::LARGEST).read_to_end(&mut content).map_err(|e| e.to_string())?;
        GuestData::parse(&content)
    }

    fn ready(&self) -> bool {
        let mut said = [0u8; 8];
        let n = self.open(guest_data::STATE, false).and_then(|mut f| f.read(&mut said)).unwrap_or(0);
        said.starts_with(b"Ready") && n >= 5
    }

    fn say(&self, ready: bool) -> std::io::Result<()> {
        self.open(guest_data::STATE, true)?.write_all(if ready { b"Ready\n" } else { b"" })
    }
}

struct Server {
    data: Arc<Data>,
    events: Arc<Events>,
    open: AtomicUsize,
}

/// Serves until it is killed.
pub(crate) fn main() -> ! {
    // SAFETY: the keeper has put them there; nobody else owns them.
    let (listener, dir) = unsafe { (UnixListener::from_raw_fd(3), OwnedFd::from_raw_fd(4)) };
    let data = Arc::new(Data { dir });
    let events = Arc::new(Events::default());
    let watched = events::watch(&data);
    if let Err(e) = confine::confine(&data.dir) {
        fail(&format!("confining itself: {e}"));
    }
    match watched {
        Ok(watched) => {
            let (data, events) = (data.clone(), events.clone());
            let work = move || events.follow(&data, &watched);
            if let Err(e) = thread::Builder::new().stack_size(STACK).spawn(work) {
                fail(&format!("no thread: {e}"));
            }
        }
        Err(e) => fail(&format!("watching the data: {e}")),
    }
    let server = Arc::new(Server { data, events, open: AtomicUsize::new(0) });
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if matches!(e.raw_os_error(), Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK)) => {
                fail(&format!("accepting: {e}"))
            }
            Err(_) => {
                thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        if server.open.fetch_add(1, Ordering::Relaxed) >= MOST {
            server.open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let of = server.clone();
        let work = move || {
            // A connection that fails concerns nobody but the guest that made it.
            let _ = of.connection(stream);
            of.open.fetch_sub(1, Ordering::Relaxed);
        };
        if thread::Builder::new().stack_size(STACK).spawn(work).is_err() {
            server.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn fail(text: &str) -> ! {
    eprintln!("karst-keeper: guest API: {text}");
    std::process::exit(1)
}

impl Server {
    fn connection(&self, mut stream: UnixStream) -> std::io::Result<()> {
        stream.set_read_timeout(Some(IDLE))?;
        stream.set_write_timeout(Some(IDLE))?;
        let mut buffer = vec![];
        loop {
            let request = match http::read(&mut stream, &mut buffer)? {
                Ok(Some(request)) => request,
                Ok(None) => return Ok(()),
                Err(refusal) => return refusal.write(&mut stream, false),
            };
            if request.path == "/1.0/events" && request.method == "GET" {
                return self.events.serve(stream, &request);
            }
            let keep = request.keep_alive;
            self.answer(&request).write(&mut stream, keep)?;
            if !keep {
                return Ok(());
            }
        }
    }

    fn answer(&self, request: &Request) -> Response {
        let data = match self.data.read() {
            Ok(data) => data,
            Err(e) => {
                eprintln!("karst-keeper: guest API: the data cannot be read: {e}");
                return Response::error(500, "the data cannot be read");
            }
        };
        let get = request.method == "GET";
        match request.path.as_str() {
            "/" if get => Response::json("[\"/1.0\"]"),
            "/1.0" if get => Response::json(&format!(
                "{{\"api_version\":\"1.0\",\"location\":{},\"instance_type\":{},\"state\":\"{}\"}}",
                quote(&data.location),
                quote(&data.instance_type),
                if self.data.ready() { "Ready" } else { "Started" },
            )),
            "/1.0" if matches!(request.method.as_str(), "PATCH" | "PUT") => self.change(&request.body),
            "/1.0/config" if get => {
                let names = data.config.keys().map(|k| quote(&format!("/1.0/config/{k}")));
                Response::json(&format!("[{}]", names.collect::<Vec<_>>().join(",")))
            }
            "/1.0/devices" if get => {
                let all = data.devices.iter().map(|(name, keys)| format!("{}:{keys}", quote(name)));
                Response::json(&format!("{{{}}}", all.collect::<Vec<_>>().join(",")))
            }
            "/1.0/meta-data" if get => Response::text(&data.meta_data),
            "/" | "/1.0" | "/1.0/config" | "/1.0/devices" | "/1.0/meta-data" | "/1.0/events" => {
                Response::error(405, "method not allowed")
            }
            path if path.starts_with("/1.0/images/") => {
                Response::error(403, "images are not handed out by this host")
            }
            path => match path.strip_prefix("/1.0/config/") {
                Some(_) if !get => Response::error(405, "method not allowed"),
                Some(key) if !key.starts_with("user.") && !key.starts_with("cloud-init.") => {
                    Response::error(403, "not authorized")
                }
                Some(key) => match data.config.get(key) {
                    Some(value) => Response::text(value),
                    None => Response::error(404, "not found"),
                },
                None => Response::error(404, "not found"),
            },
        }
    }

    fn change(&self, body: &[u8]) -> Response {
        let ready = match http::only_member(body) {
            Some((name, value)) if name == "state" && value == "Ready" => true,
            Some((name, value)) if name == "state" && value == "Started" => false,
            _ => {
                return Response::error(
                    400,
                    "the body is {\"state\": \"Ready\"} or {\"state\": \"Started\"}",
                );
            }
        };
        match self.data.say(ready) {
            Ok(()) => Response::empty(),
            Err(e) => {
                eprintln!("karst-keeper: guest API: the state cannot be kept: {e}");
                Response::error(500, "the state cannot be kept")
            }
        }
    }
}
