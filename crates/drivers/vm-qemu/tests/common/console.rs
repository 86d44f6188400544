//! The shell that the small Linux has on its console.

use karst_guest::GuestDriver;
use karst_model::InstanceId;
use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

/// Nothing that a test waits for takes longer, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// A console with a shell at its end.
pub struct Shell {
    stream: UnixStream,
    seen: String,
    asked: u32,
}

impl Shell {
    /// Attaches; the guest may still boot.
    pub async fn open(driver: &dyn GuestDriver, id: InstanceId) -> Self {
        let stream = UnixStream::from(driver.console(id, true).await.unwrap());
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        Self { stream, seen: String::new(), asked: 0 }
    }

    fn read_until(&mut self, mark: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.seen.find(mark) {
                let rest = self.seen.split_off(at + mark.len());
                let mut text = std::mem::replace(&mut self.seen, rest);
                text.truncate(at);
                return text;
            }
            assert!(Instant::now() < end, "{mark:?} does not come: {:?}", self.seen);
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => panic!("the console ended: {:?}", self.seen),
                Ok(n) => self.seen.push_str(&String::from_utf8_lossy(&buffer[..n])),
                Err(e)
                    if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                Err(e) => panic!("{e}"),
            }
        }
    }

    /// Waits until the shell is there.
    pub fn until_up(&mut self) {
        tokio::task::block_in_place(|| self.read_until("small linux is up"));
        self.run("PS1=; PS2=");
    }

    /// What a line prints.
    pub fn run(&mut self, line: &str) -> String {
        self.asked += 1;
        let (begin, end) = (format!("<{}<", self.asked), format!(">{}>", self.asked));
        // The marks are put together by the shell, so that an echo of the line is none.
        let (n, line) = (self.asked, format!("{{ {line}; }} 2>&1"));
        tokio::task::block_in_place(|| {
            writeln!(self.stream, "echo \"<\"{n}\"<\"; {line}; echo \">\"{n}\">\"").unwrap();
            self.read_until(&begin);
            self.read_until(&end).replace('\r', "").trim().to_owned()
        })
    }

    /// Asks again until it prints this.
    pub fn until(&mut self, line: &str, wanted: &str) {
        let end = Instant::now() + PATIENCE;
        loop {
            let got = self.run(line);
            if got == wanted {
                return;
            }
            assert!(Instant::now() < end, "{line}: {got:?}, not {wanted:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}
