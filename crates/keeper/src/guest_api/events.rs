//! Changes of the guest's data as events: the file is watched, what differs is told to those who listen, over a websocket or
//! as a line of JSON each.

use super::{
    Data,
    http::{Request, quote},
};
use karst_keeper::guest_data::{self, GuestData};
use rustix::fs::inotify;
use std::{
    collections::VecDeque,
    io::{Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Condvar, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Events kept for a listener that is slow.
const KEPT: usize = 256;
/// How often a listener is looked after.
const LOOK: Duration = Duration::from_secs(2);

/// A descriptor that tells of changes in the data directory.
pub(super) fn watch(data: &Data) -> std::io::Result<OwnedFd> {
    let fd = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    let dir = format!("/proc/self/fd/{}", data.dir.as_raw_fd());
    inotify::add_watch(&fd, dir, inotify::WatchFlags::MOVED_TO)?;
    Ok(fd)
}

#[derive(Default)]
struct Kept {
    next: u64,
    /// Number, type and text.
    events: VecDeque<(u64, &'static str, String)>,
}

/// The events.
#[derive(Default)]
pub(super) struct Events {
    kept: Mutex<Kept>,
    came: Condvar,
}

impl Events {
    /// Tells of changes for ever.
    pub(super) fn follow(&self, data: &Data, watched: &OwnedFd) {
        let mut last = data.read().unwrap_or_default();
        let mut buffer = [MaybeUninit::uninit(); 1024];
        loop {
            let mut reader = inotify::Reader::new(watched, &mut buffer);
            let changed = match reader.next() {
                Ok(event) => event.file_name().is_some_and(|n| n.to_bytes() == guest_data::FILE.as_bytes()),
                Err(rustix::io::Errno::INTR) => false,
                Err(_) => return,
            };
            if let (true, Ok(now)) = (changed, data.read()) {
                for (kind, metadata) in differences(&last, &now) {
                    self.publish(kind, &metadata);
                }
                last = now;
            }
        }
    }

    fn publish(&self, kind: &'static str, metadata: &str) {
        let text = format!("{{\"timestamp\":{},\"type\":\"{kind}\",\"metadata\":{metadata}}}", quote(&now()));
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let n = kept.next;
        kept.next += 1;
        kept.events.push_back((n, kind, text));
        if kept.events.len() > KEPT {
            kept.events.pop_front();
        }
        self.came.notify_all();
    }

    /// Serves a listener until it leaves.
    pub(super) fn serve(&self, mut stream: UnixStream, request: &Request) -> std::io::Result<()> {
        let wanted = request.query.split('&').find_map(|p| p.strip_prefix("type=")).unwrap_or_default();
        let wanted: Vec<&str> = wanted.split(',').filter(|w| !w.is_empty()).collect();
        let mut at = self.kept.lock().unwrap_or_else(PoisonError::into_inner).next;
        match &request.websocket {
            Some(key) => {
                let accept = base64(&sha1(format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11").as_bytes()));
                write!(
                    stream,
                    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                     Sec-WebSocket-Accept: {accept}\r\n\r\n"
                )?;
            }
            None => write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
            )?,
        }
        stream.set_read_timeout(Some(Duration::from_millis(1)))?;
        loop {
            let mut ready = vec![];
            {
                let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
                let waiting = |k: &mut Kept| k.next == at;
                let waited = self.came.wait_timeout_while(kept, LOOK, waiting);
                let (kept, _) = waited.unwrap_or_else(PoisonError::into_inner);
                for (n, kind, text) in &kept.events {
                    if *n >= at && (wanted.is_empty() || wanted.contains(kind)) {
                        ready.push(text.clone());
                    }
                }
                at = kept.next;
            }
            for text in ready {
                match request.websocket {
                    Some(_) => stream.write_all(&frame(1, text.as_bytes()))?,
                    None => stream.write_all(format!("{text}\n").as_bytes())?,
                }
            }
            // What a listener says is read and dropped, but for its good-bye.
            let mut said = [0u8; 1024];
            match stream.read(&mut said) {
                Ok(0) => return Ok(()),
                Ok(_) if request.websocket.is_some() && said[0] & 0x0f == 8 => {
                    return stream.write_all(&frame(8, &[]));
                }
                Ok(_) => {}
                Err(e)
                    if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// A whole message of a server. RFC 6455, 5.2.
fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![0x80 | opcode];
    match payload.len() {
        n if n < 126 => out.push(n as u8),
        n if n <= 0xffff => {
            out.push(126);
            out.extend((n as u16).to_be_bytes());
        }
        n => {
            out.push(127);
            out.extend((n as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(payload);
    out
}

/// Types and contents of what happened between two states.
fn differences(old: &GuestData, new: &GuestData) -> Vec<(&'static str, String)> {
    let mut found = vec![];
    let keys = old.config.keys().chain(new.config.keys().filter(|k| !old.config.contains_key(*k)));
    for key in keys {
        let value = |data: &GuestData| data.config.get(key).cloned().unwrap_or_default();
        let (before, after) = (value(old), value(new));
        if before != after {
            let (key, before, after) = (quote(key), quote(&before), quote(&after));
            let text = format!("{{\"key\":{key},\"old_value\":{before},\"value\":{after}}}");
            found.push(("config", text));
        }
    }
    let names = old.devices.keys().chain(new.devices.keys().filter(|k| !old.devices.contains_key(*k)));
    for name in names {
        let (action, keys) = match (old.devices.get(name), new.devices.get(name)) {
            (None, Some(keys)) => ("added", keys),
            (Some(keys), None) => ("removed", keys),
            (Some(before), Some(keys)) if before != keys => ("updated", keys),
            _ => continue,
        };
        let text = format!("{{\"action\":\"{action}\",\"name\":{},\"config\":{keys}}}", quote(name));
        found.push(("device", text));
    }
    found
}

/// The time as RFC 3339 has it, UTC.
fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = ((since.as_secs() / 86_400) as i64, since.as_secs() % 86_400);
    // Days to a date: Howard Hinnant's `civil_from_days`.
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + i64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        since.subsec_nanos()
    )
}

/// SHA-1, for the handshake of websockets alone. RFC 3174.
fn sha1(data: &[u8]) -> [u8; 20] {
    let mut h: [u32; 5] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0];
    let mut message = data.to_vec();
    message.push(0x80);
    while message.len() % 64 != 56 {
        message.push(0);
    }
    message.extend(((data.len() as u64) * 8).to_be_bytes());
    for block in message.chunks_exact(64) {
        let mut w = [0u32; 80];
        for (word, bytes) in w.iter_mut().zip(block.chunks_exact(4)) {
            *word = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        for t in 16..80 {
            w[t] = (w[t - 3] ^ w[t - 8] ^ w[t - 14] ^ w[t - 16]).rotate_left(1);
        }
        let [mut a, mut b, mut c, mut d, mut e] = h;
        for (t, word) in w.iter().enumerate() {
            let (f, k) = match t / 20 {
                0 => ((b & c) | (!b & d), 0x5a82_7999),
                1 => (b ^ c ^ d, 0x6ed9_eba1),
                2 => ((b & c) | (b & d) | (c & d), 0x8f1b_bcdc),
                _ => (b ^ c ^ d, 0xca62_c1d6u32),
            };
            let next = a.rotate_left(5).wrapping_add(f).wrapping_add(e).wrapping_add(k).wrapping_add(*word);
            (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
        }
        for (sum, part) in h.iter_mut().zip([a, b, c, d, e]) {
            *sum = sum.wrapping_add(part);
        }
    }
    let mut out = [0; 20];
    for (to, word) in out.chunks_exact_mut(4).zip(h) {
        to.copy_from_slice(&word.to_be_bytes());
    }
    out
}

fn base64(data: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in data.chunks(3) {
        let bits = chunk.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * i)) as usize & 63] as char;
            out.push(if i <= chunk.len() { digit } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_handshake_is_the_one_of_the_standard() {
        // RFC 6455, 1.3.
        let key = b"dGhlIHNhbXBsZSBub25jZQ==258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
        assert_eq!(base64(&sha1(key)), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(frame(1, &[7; 200])[..4], [0x81, 126, 0, 200]);
    }

    #[test]
    fn differences_are_told() {
        let data = |value: &str, device: Option<&str>| GuestData {
            config: [("user.a".to_owned(), value.to_owned())].into(),
            devices: device.map(|d| ("eth0".to_owned(), d.to_owned())).into_iter().collect(),
            ..GuestData::default()
        };
        let found = differences(&data("1", None), &data("2", Some("{}")));
        let expected = [
            ("config", r#"{"key":"user.a","old_value":"1","value":"2"}"#),
            ("device", r#"{"action":"added","name":"eth0","config":{}}"#),
        ];
        assert_eq!(found.iter().map(|(k, t)| (*k, t.as_str())).collect::<Vec<_>>(), expected);
        assert!(differences(&data("1", None), &data("1", None)).is_empty());
        assert!(now().len() == 30 && now().starts_with("20"));
    }
}
