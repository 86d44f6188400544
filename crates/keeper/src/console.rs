//! The console: drained always, kept in a log of two bounded files, and relayed to at most one client.

use crate::{Dir, sys};
use karst_keeper::{Console as Mode, Spec, files};
use rustix::{
    io::Errno,
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{OptionalActions, Winsize, tcgetattr, tcsetattr, tcsetwinsize},
};
use std::{
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
    path::PathBuf,
};

/// What a slow client may be behind before it loses output; the guest itself never waits.
const CLIENT_BUFFER: usize = 64 * 1024;

/// The main process' end.
pub(crate) enum ChildEnd {
    None,
    Pty(OwnedFd),
    Socket(OwnedFd, RawFd),
}

struct Log {
    current: PathBuf,
    old: PathBuf,
    /// Begins a new part; takes the place of the current one.
    new: PathBuf,
    size: u64,
    limit: u64,
    file: Option<File>,
}

impl Log {
    fn open(dir: &Dir, limit: u64) -> Self {
        let mut log = Log {
            current: dir.path(files::CONSOLE),
            old: dir.path(files::CONSOLE_OLD),
            new: dir.path("console.log.new"),
            size: 0,
            limit: limit.max(4096),
            file: None,
        };
        log.reopen();
        log
    }

    fn reopen(&mut self) {
        self.file = File::options().append(true).create(true).mode(0o600).open(&self.current).ok();
        self.measure();
    }

    fn measure(&mut self) {
        self.size = self.file.as_ref().and_then(|f| f.metadata().ok()).map_or(0, |m| m.len());
    }

    /// Begins a new part, where the old one is kept until the new one is there: a full disk has room again some day.
    fn rotate(&mut self) -> io::Result<()> {
        // Standard options do not combine appending with the emptying of what a crash left.
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(libc::O_APPEND)
            .mode(0o600)
            .open(&self.new)?;
        match std::fs::rename(&self.current, &self.old) {
            // Somebody removed it: nothing is to be kept.
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => std::fs::rename(&self.new, &self.current)?,
        }
        self.file = Some(file);
        self.size = 0;
        Ok(())
    }

    /// Appends; a full disk loses log, never the guest.
    fn append(&mut self, bytes: &[u8]) {
        if self.file.is_none() {
            self.reopen();
        }
        if self.size + bytes.len() as u64 > self.limit && self.size > 0 && self.rotate().is_err() {
            // What comes now is worth more than what came before, and the bound holds.
            if let Some(f) = &self.file
                && f.set_len(0).is_ok()
            {
                self.size = 0;
            }
        }
        if let Some(f) = &mut self.file {
            match f.write_all(bytes) {
                Ok(()) => self.size += bytes.len() as u64,
                // A part of it may have been written.
                Err(_) => self.measure(),
            }
        }
    }

    fn clear(&mut self) {
        let _ = std::fs::remove_file(&self.old);
        if self.file.is_none() {
            self.reopen();
        }
        if let Some(f) = &self.file
            && f.set_len(0).is_ok()
        {
            self.size = 0;
        }
    }
}

/// The keeper's side.
pub(crate) struct Console {
    /// Master of the terminal, or our end of the socket pair.
    end: Option<OwnedFd>,
    /// Held so that the master does not report a hang-up between two openers.
    slave: Option<OwnedFd>,
    log: Log,
    client: Option<OwnedFd>,
    to_guest: Vec<u8>,
    to_client: Vec<u8>,
}

impl Console {
    /// Opens both ends.
    pub(crate) fn new(spec: &Spec, dir: &Dir) -> io::Result<(Self, ChildEnd)> {
        let mut console = Console {
            end: None,
            slave: None,
            log: Log::open(dir, spec.log_size),
            client: None,
            to_guest: vec![],
            to_client: vec![],
        };
        let child = match spec.console {
            Mode::None => ChildEnd::None,
            Mode::Pty => {
                let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
                let master = openpt(flags)?;
                grantpt(&master)?;
                unlockpt(&master)?;
                let slave = ioctl_tiocgptpeer(&master, flags)?;
                let mut t = tcgetattr(&slave)?;
                t.make_raw();
                tcsetattr(&slave, OptionalActions::Now, &t)?;
                let _ = tcsetwinsize(&slave, Winsize { ws_col: 80, ws_row: 24, ws_xpixel: 0, ws_ypixel: 0 });
                sys::nonblocking(&master);
                let child = slave.try_clone()?;
                console.end = Some(master);
                console.slave = Some(slave);
                ChildEnd::Pty(child)
            }
            Mode::Socket(number) => {
                let (ours, theirs) = sys::stream_pair()?;
                sys::nonblocking(&ours);
                console.end = Some(ours);
                ChildEnd::Socket(theirs, number)
            }
        };
        Ok((console, child))
    }

    /// The guest's end and the events to wait for.
    pub(crate) fn guest_poll(&self) -> Option<(BorrowedFd<'_>, i16)> {
        let out = if self.to_guest.is_empty() { 0 } else { libc::POLLOUT };
        self.end.as_ref().map(|e| (e.as_fd(), libc::POLLIN | out))
    }

    /// The client's end and the events to wait for.
    pub(crate) fn client_poll(&self) -> Option<(BorrowedFd<'_>, i16)> {
        let out = if self.to_client.is_empty() { 0 } else { libc::POLLOUT };
        // A client is read only when the guest took what it wrote before.
        let r#in = if self.to_guest.is_empty() { libc::POLLIN } else { 0 };
        self.client.as_ref().map(|c| (c.as_fd(), r#in | out))
    }

    /// The guest's end is ready.
    pub(crate) fn guest_ready(&mut self, events: i16) {
        if events & (libc::POLLIN | libc::POLLHUP | libc::POLLERR) != 0 {
            self.drain();
        }
        self.flush();
    }

    /// Reads what the guest wrote, at most 1 MiB at a time so that a flood does not starve the socket.
    pub(crate) fn drain(&mut self) {
        let mut buffer = [0u8; 16 * 1024];
        for _ in 0..64 {
            let Some(end) = &self.end else { return };
            match rustix::io::read(end, &mut buffer) {
                Ok(0) => self.end = None,
                Ok(n) => {
                    self.log.append(&buffer[..n]);
                    if self.client.is_some() {
                        let room = CLIENT_BUFFER - self.to_client.len();
                        self.to_client.extend_from_slice(&buffer[..n.min(room)]);
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.end = None,
            }
        }
    }

    /// Reads the last words of a guest that has ended. Without an opener of the other end, a terminal answers all that
    /// is still on its way and then an error.
    pub(crate) fn drain_to_end(&mut self) {
        self.slave = None;
        self.drain();
        self.flush();
    }

    /// The client's end is ready.
    pub(crate) fn client_ready(&mut self, events: i16) {
        if events & (libc::POLLIN | libc::POLLHUP | libc::POLLERR) != 0
            && self.to_guest.is_empty()
            && let Some(client) = &self.client
        {
            let mut buffer = [0u8; 4096];
            match rustix::io::read(client, &mut buffer) {
                Ok(n @ 1..) => self.to_guest.extend_from_slice(&buffer[..n]),
                Err(Errno::AGAIN | Errno::INTR) => {}
                _ => self.client = None,
            }
        } else if events & libc::POLLHUP != 0 {
            // Gone while its last input is still on the way to a guest that does not read: nobody to report to.
            self.client = None;
        }
        self.flush();
    }

    /// Writes what is pending, as far as it goes.
    pub(crate) fn flush(&mut self) {
        fn push(fd: &OwnedFd, pending: &mut Vec<u8>) -> bool {
            while !pending.is_empty() {
                match rustix::io::write(fd, pending) {
                    Ok(n) => drop(pending.drain(..n)),
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => return true,
                    Err(_) => return false,
                }
            }
            true
        }
        match &self.end {
            Some(end) => {
                if !push(end, &mut self.to_guest) {
                    self.to_guest.clear();
                }
            }
            None => self.to_guest.clear(),
        }
        if let Some(client) = &self.client
            && !push(client, &mut self.to_client)
        {
            self.client = None;
        }
        if self.client.is_none() {
            self.to_client = vec![];
        }
    }

    /// Makes a new attachment; the caller's end, or `None` when somebody is attached and `force` is not set.
    pub(crate) fn attach(&mut self, force: bool) -> io::Result<Option<OwnedFd>> {
        if self.client.is_some() && !force {
            return Ok(None);
        }
        let (ours, theirs) = sys::stream_pair()?;
        sys::nonblocking(&ours);
        self.client = Some(ours);
        self.to_client.clear();
        Ok(Some(theirs))
    }

    /// Is there a console at all?
    pub(crate) fn exists(&self) -> bool {
        self.end.is_some()
    }

    /// New size of a terminal; `false` when there is none.
    pub(crate) fn resize(&self, columns: u16, rows: u16) -> bool {
        let (Some(end), Some(_)) = (&self.end, &self.slave) else {
            return false;
        };
        let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(end, size).is_ok()
    }

    /// Empties the log.
    pub(crate) fn clear(&mut self) {
        self.log.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_cannot_be_rotated_stays_bounded_and_is_rotated_later() {
        let directory = tempfile::tempdir().unwrap();
        let fd = File::open(directory.path()).unwrap().into();
        let dir = Dir { fd, replaced: Default::default() };
        // No file takes the place of a directory.
        let (current, old) = (directory.path().join("console.log"), directory.path().join("console.log.1"));
        std::fs::create_dir(&old).unwrap();
        let mut log = Log::open(&dir, 4096);
        for n in 0..100 {
            log.append(format!("{n:0>1000}\n").as_bytes());
            assert!(std::fs::metadata(&current).unwrap().len() <= 4096);
        }
        assert!(std::fs::read_to_string(&current).unwrap().ends_with("99\n"));

        std::fs::remove_dir(&old).unwrap();
        for n in 100..110 {
            log.append(format!("{n:0>1000}\n").as_bytes());
        }
        let (new, kept) =
            (std::fs::read_to_string(&current).unwrap(), std::fs::read_to_string(&old).unwrap());
        assert!(new.ends_with("109\n") && new.len() <= 4096, "{new}");
        let (first, last) = (new.lines().next().unwrap(), kept.lines().last().unwrap());
        let number = |line: &str| line.trim_start_matches('0').parse::<u32>().unwrap();
        assert_eq!(number(last) + 1, number(first), "nothing is lost between the two");
    }

    #[test]
    fn a_log_that_could_not_be_opened_is_opened_when_it_can_be() {
        let directory = tempfile::tempdir().unwrap();
        let fd = File::open(directory.path()).unwrap().into();
        let dir = Dir { fd, replaced: Default::default() };
        let current = directory.path().join("console.log");
        std::fs::create_dir(&current).unwrap();
        let mut log = Log::open(&dir, 4096);
        log.append(b"lost\n");
        std::fs::remove_dir(&current).unwrap();
        log.append(b"kept\n");
        assert_eq!(std::fs::read_to_string(&current).unwrap(), "kept\n");
    }
}
