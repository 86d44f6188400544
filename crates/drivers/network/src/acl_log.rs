//! What rules of ACLs log: from the kernel's group into one bounded file for each ACL.
//!
//! A rule carries its origin as the prefix of what it logs; the file's name is the ACL's id, so a rename loses nothing. An
//! entry is one line of JSON in the words of Incus' log of ACLs, with the direction and the rule beside. Numbers and addresses
//! only: nothing that a guest sends stands in it as text. Files are rotated once, by size; with the rate of the rules that
//! bounds what any guest can write.

use crate::{NetworkDriver, blocking, record::make_directory};
use karst_host::packet_log::{LoggedPacket, PacketLog};
use karst_model::{
    AclId, Error, Result,
    firewall::{Action, Direction},
};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    fs,
    io::{ErrorKind, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// Size from which a file becomes the earlier one.
const PART: u64 = 256 << 10;
/// So long a file is kept into which nothing is written.
const KEPT: Duration = Duration::from_secs(90 * 24 * 3600);
/// Between two tries to read a group that cannot be read.
const PAUSE: Duration = Duration::from_secs(5);
const DIRECTORY: &str = "acl-logs";

/// The rule that logged a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Origin {
    pub acl: AclId,
    pub rule: u32,
    pub direction: Direction,
    pub action: Action,
}

impl Origin {
    /// As rules of a daemon carry it: at most 83 bytes; the kernel takes 127.
    pub fn prefix(&self, daemon: &str) -> String {
        let Self { acl, rule, direction, action } = self;
        format!("karst-{daemon} {} {rule} {} {} ", acl.uuid().simple(), direction.as_str(), action.as_str())
    }

    /// Reads a prefix; `None` of what is not a rule of this daemon's.
    pub fn of(prefix: &str, daemon: &str) -> Option<Self> {
        let mut words = prefix.strip_prefix("karst-")?.strip_prefix(daemon)?.strip_prefix(' ')?.split(' ');
        let acl = words.next()?.parse().ok()?;
        let rule = words.next()?.parse().ok()?;
        let direction = words.next()?;
        let direction =
            [Direction::Ingress, Direction::Egress].into_iter().find(|d| d.as_str() == direction)?;
        let action = words.next()?;
        let action = Action::ORDER.into_iter().find(|a| a.as_str() == action)?;
        Some(Self { acl, rule, direction, action })
    }
}

/// A line of the log. The first nine as Incus writes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Entry {
    time: String,
    proto: String,
    src: String,
    dst: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    src_port: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dst_port: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    icmp_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    icmp_code: Option<String>,
    action: &'static str,
    direction: &'static str,
    rule: u32,
}

/// What of a packet stands in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Headers {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    /// The first four bytes behind the headers: ports, or type and code. `None` of later fragments, and where they are not there.
    rest: Option<[u8; 4]>,
}

impl Headers {
    /// Reads the beginning of a packet; `None` of what is neither IPv4 nor IPv6, or too short to tell.
    fn of(packet: &LoggedPacket) -> Option<Self> {
        let (mut protocol, mut bytes) = (packet.protocol, packet.payload.as_slice());
        // Tags of VLANs, which a guest may send through a bridge.
        for _ in 0..2 {
            if matches!(protocol, 0x8100 | 0x88a8) {
                protocol = u16::from_be_bytes([*bytes.get(2)?, *bytes.get(3)?]);
                bytes = bytes.get(4..)?;
            }
        }
        match protocol {
            0x0800 => Self::v4(bytes),
            0x86dd => Self::v6(bytes),
            _ => None,
        }
    }

    fn v4(bytes: &[u8]) -> Option<Self> {
        let header = bytes.first_chunk::<20>()?;
        let length = usize::from(header[0] & 0x0f) * 4;
        if header[0] >> 4 != 4 || length < 20 {
            return None;
        }
        let address = |at: usize| -> IpAddr {
            Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]).into()
        };
        let later = u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0;
        let rest = bytes.get(length..).and_then(|b| b.first_chunk::<4>()).copied();
        Some(Self {
            source: address(12),
            destination: address(16),
            protocol: header[9],
            rest: rest.filter(|_| !later),
        })
    }

    fn v6(bytes: &[u8]) -> Option<Self> {
        let header = bytes.first_chunk::<40>()?;
        if header[0] >> 4 != 6 {
            return None;
        }
        let address = |at: usize| -> Option<IpAddr> {
            let bytes: [u8; 16] = header.get(at..at + 16)?.try_into().ok()?;
            Some(Ipv6Addr::from(bytes).into())
        };
        let (mut protocol, mut rest, mut later) = (header[6], &bytes[40..], false);
        for _ in 0..8 {
            let length = match protocol {
                // Hop-by-hop options, routing, destination options: the length counts eight bytes, the first left out.
                0 | 43 | 60 => (usize::from(*rest.get(1).unwrap_or(&0)) + 1) * 8,
                44 => {
                    later |= rest.get(2..4).is_some_and(|b| u16::from_be_bytes([b[0], b[1]]) & 0xfff8 != 0);
                    8
                }
                _ => break,
            };
            let (Some(next), Some(behind)) = (rest.first(), rest.get(length..)) else { break };
            (protocol, rest) = (*next, behind);
        }
        Some(Self {
            source: address(8)?,
            destination: address(24)?,
            protocol,
            rest: rest.first_chunk::<4>().copied().filter(|_| !later),
        })
    }

    fn name(&self) -> String {
        let known = [
            (1, "icmp"),
            (2, "igmp"),
            (6, "tcp"),
            (17, "udp"),
            (47, "gre"),
            (50, "esp"),
            (58, "icmp6"),
            (132, "sctp"),
        ];
        known
            .iter()
            .find(|(n, _)| *n == self.protocol)
            .map_or_else(|| self.protocol.to_string(), |(_, name)| (*name).to_owned())
    }
}

/// The line of a packet; `None` of what is no packet of IP.
fn line(origin: Origin, packet: &LoggedPacket, time: &str) -> Option<String> {
    let headers = Headers::of(packet)?;
    let ports = headers.rest.filter(|_| matches!(headers.protocol, 6 | 17 | 132));
    let icmp = headers.rest.filter(|_| matches!(headers.protocol, 1 | 58));
    let entry = Entry {
        time: time.to_owned(),
        proto: headers.name(),
        src: headers.source.to_string(),
        dst: headers.destination.to_string(),
        src_port: ports.map(|[a, b, _, _]| u16::from_be_bytes([a, b]).to_string()),
        dst_port: ports.map(|[_, _, a, b]| u16::from_be_bytes([a, b]).to_string()),
        icmp_type: icmp.map(|[kind, ..]| kind.to_string()),
        icmp_code: icmp.map(|[_, code, ..]| code.to_string()),
        action: origin.action.as_str(),
        direction: origin.direction.as_str(),
        rule: origin.rule,
    };
    serde_json::to_string(&entry).ok()
}

/// What came, by ACL.
fn lines(daemon: &str, packets: &[LoggedPacket], time: &str) -> BTreeMap<AclId, String> {
    let mut all: BTreeMap<AclId, String> = BTreeMap::new();
    for packet in packets {
        let Some(origin) = Origin::of(&packet.prefix, daemon) else { continue };
        if let Some(line) = line(origin, packet, time) {
            let text = all.entry(origin.acl).or_default();
            text.push_str(&line);
            text.push('\n');
        }
    }
    all
}

/// The file now, and the one before it.
fn files(directory: &Path, acl: AclId) -> [PathBuf; 2] {
    [directory.join(acl.to_string()), directory.join(format!("{acl}.1"))]
}

fn append(directory: &Path, acl: AclId, text: &str) -> Result<()> {
    make_directory(directory, 0o700, None)?;
    let [now, before] = files(directory, acl);
    let size = fs::metadata(&now).map_or(0, |m| m.len());
    if size > 0 && size + text.len() as u64 > PART {
        fs::rename(&now, before)?;
    }
    // Opened for each batch: who deletes the file loses what stood in it, and no more.
    let mut file = fs::OpenOptions::new().append(true).create(true).mode(0o600).open(now)?;
    file.write_all(text.as_bytes())?;
    Ok(())
}

fn read(directory: &Path, acl: AclId, max: usize) -> Result<Vec<u8>> {
    let mut all = vec![];
    let [now, before] = files(directory, acl);
    for file in [before, now] {
        match fs::read(file) {
            Ok(bytes) => all.extend(bytes),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
    }
    if all.len() > max {
        // Whole lines, the newest.
        let from = all.len() - max;
        let from = all[from..].iter().position(|b| *b == b'\n').map_or(all.len(), |at| from + at + 1);
        all.drain(..from);
    }
    Ok(all)
}

fn remove(directory: &Path, acl: AclId) -> Result<()> {
    for file in files(directory, acl) {
        match fs::remove_file(file) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
    }
    Ok(())
}

/// Removes files into which nothing was written for long: of ACLs that went while this host did not answer.
fn sweep(directory: &Path, now: SystemTime) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let written = entry.metadata().and_then(|m| m.modified());
        let old = written.is_ok_and(|at| now.duration_since(at).is_ok_and(|age| age > KEPT));
        if old && let Err(e) = fs::remove_file(entry.path()) {
            tracing::warn!(error = %e, "an old log of a network ACL could not be removed");
        }
    }
}

/// Where the rules of this process log to. Reads until it is dropped.
#[derive(Debug)]
pub(crate) struct Reader {
    /// Its group.
    pub group: u16,
    task: tokio::task::AbortHandle,
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Reader {
    /// Binds a group and begins to read it.
    ///
    /// # Errors
    /// Those of [`PacketLog::open`].
    pub fn start(daemon: &str, state: &Path) -> Result<Self> {
        // Daemons of one machine begin apart from each other, and from the numbers that people choose by hand.
        let hash = daemon.bytes().fold(0u16, |h, b| h.wrapping_mul(31).wrapping_add(u16::from(b)));
        let log = PacketLog::open(4096 + hash % 16_384)?;
        let group = log.group();
        let task = tokio::spawn(follow(log, daemon.to_owned(), state.join(DIRECTORY))).abort_handle();
        Ok(Self { group, task })
    }
}

async fn follow(mut log: PacketLog, daemon: String, directory: PathBuf) {
    let swept = directory.clone();
    // Its faults were told where they arose; the log is read all the same.
    let _ = blocking(move || {
        sweep(&swept, SystemTime::now());
        Ok(())
    })
    .await;
    let mut told = false;
    loop {
        let (packets, whole) = match log.next().await {
            Ok(found) => found,
            Err(e) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::error!(error = %e, context = e.context, "what network ACLs log cannot be read");
                }
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        if !whole {
            tracing::debug!("network ACLs logged more than was read");
        }
        let time = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let (directory, all) = (directory.clone(), lines(&daemon, &packets, &time));
        let written =
            blocking(move || all.iter().try_for_each(|(acl, text)| append(&directory, *acl, text))).await;
        match written {
            Ok(()) => told = false,
            Err(e) if !told => {
                told = true;
                tracing::error!(error = %e, context = e.context, "what network ACLs log cannot be written");
            }
            Err(_) => {} // told already, and nothing else has changed since
        }
    }
}

impl NetworkDriver {
    /// What the rules of an ACL logged on this host, the newest lines of at most `max` bytes; nothing of one that logged nothing.
    ///
    /// # Errors
    /// Unsupported where this kernel hands logged packets to no program, and rules log to the kernel's own log.
    pub async fn acl_log(&self, acl: AclId, max: usize) -> Result<Vec<u8>> {
        let directory = self.0.paths.0.join(DIRECTORY);
        let found = blocking(move || read(&directory, acl, max)).await?;
        if found.is_empty() && self.0.firewall.lock().await.logs_to_kernel() {
            return Err(Error::unsupported(format!(
                "this host's kernel hands logged packets to no program (nfnetlink_log): what network ACLs log is in the \
                 kernel's own log, in lines that begin with \"karst-{} acl\"",
                self.0.daemon
            )));
        }
        Ok(found)
    }

    /// Forgets what an ACL logged. Idempotent.
    ///
    /// # Errors
    /// Internal.
    pub async fn acl_log_remove(&self, acl: AclId) -> Result<()> {
        let directory = self.0.paths.0.join(DIRECTORY);
        blocking(move || remove(&directory, acl)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin() -> Origin {
        Origin {
            acl: AclId(uuid::Uuid::from_u128(7)),
            rule: 3,
            direction: Direction::Ingress,
            action: Action::AllowStateless,
        }
    }

    fn packet(protocol: u16, payload: &[u8]) -> LoggedPacket {
        LoggedPacket { prefix: origin().prefix("ab12cd"), protocol, payload: payload.to_vec() }
    }

    fn tcp4() -> Vec<u8> {
        let mut bytes = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 9, 10, 77, 1, 10];
        bytes.extend([0x9c, 0x40, 0, 80, 0, 0]);
        bytes
    }

    #[test]
    fn origins_are_written_and_read_back() {
        let longest = Origin { rule: u32::MAX, ..origin() }.prefix("abcdefgh");
        assert!(longest.len() <= 83, "{}", longest.len());
        assert_eq!(Origin::of(&origin().prefix("ab12cd"), "ab12cd"), Some(origin()));
        for foreign in [
            "",
            "karst-ab12cd ",
            "karst-ab12c 7 3 ingress allow ",
            "karst-ab12cd x 3 ingress allow ",
            "ab12cd",
        ] {
            assert_eq!(Origin::of(foreign, "ab12cd"), None, "{foreign}");
        }
        assert_eq!(Origin::of(&origin().prefix("ab12cd"), "ab12ce"), None, "another daemon's");
    }

    #[test]
    fn packets_become_lines() {
        let said = |p: &LoggedPacket| line(origin(), p, "2026-01-02T03:04:05Z");
        assert_eq!(
            said(&packet(0x0800, &tcp4())).unwrap(),
            r#"{"time":"2026-01-02T03:04:05Z","proto":"tcp","src":"192.0.2.9","dst":"10.77.1.10","src_port":"40000","dst_port":"80","action":"allow-stateless","direction":"ingress","rule":3}"#
        );
        // A later fragment has no ports, whatever stands where they would.
        let mut later = tcp4();
        later[7] = 1;
        assert!(!said(&packet(0x0800, &later)).unwrap().contains("port"));
        let mut tagged = vec![0, 5, 0x08, 0];
        tagged.extend(tcp4());
        assert!(said(&packet(0x8100, &tagged)).unwrap().contains(r#""dst_port":"80""#));
        let mut ping = tcp4();
        ping[9] = 1;
        ping[20..22].copy_from_slice(&[8, 0]);
        let ping = said(&packet(0x0800, &ping)).unwrap();
        assert!(
            ping.contains(r#""proto":"icmp""#) && ping.contains(r#""icmp_type":"8","icmp_code":"0""#),
            "{ping}"
        );

        let mut six = vec![0x60, 0, 0, 0, 0, 16, 0, 64];
        six.extend([0xfd; 16]);
        six.extend([0xfe; 16]);
        six.extend([17, 0, 0, 0, 0, 0, 0, 0]); // hop-by-hop, then UDP
        six.extend([0, 53, 0x13, 0x88]);
        let udp = said(&packet(0x86dd, &six)).unwrap();
        assert!(
            udp.contains(r#""proto":"udp""#) && udp.contains(r#""src_port":"53","dst_port":"5000""#),
            "{udp}"
        );
        // Cut anywhere: a line, or none, and no panic.
        for bytes in [tcp4(), six] {
            for (end, protocol) in (0..bytes.len()).flat_map(|n| [(n, 0x0800), (n, 0x86dd), (n, 0x8100)]) {
                let _ = said(&packet(protocol, &bytes[..end]));
            }
        }
        assert_eq!(said(&packet(0x0806, &tcp4())), None);
    }

    #[test]
    fn files_are_bounded_and_survive_who_deletes_them() {
        let work = tempfile::tempdir().unwrap();
        let (directory, acl) = (work.path().join("logs"), AclId(uuid::Uuid::from_u128(7)));
        assert_eq!(read(&directory, acl, 100).unwrap(), b"");
        let text = format!("{}\n", "x".repeat(999));
        for _ in 0..2000 {
            append(&directory, acl, &text).unwrap();
        }
        let sizes: Vec<u64> = files(&directory, acl).iter().map(|f| fs::metadata(f).unwrap().len()).collect();
        assert!(sizes.iter().all(|s| *s <= PART) && sizes[1] > PART - 1000, "{sizes:?}");
        let newest = read(&directory, acl, 2500).unwrap();
        assert_eq!(newest, text.repeat(2).as_bytes(), "whole lines only");
        fs::remove_dir_all(&directory).unwrap();
        append(&directory, acl, "again\n").unwrap();
        assert_eq!(read(&directory, acl, 100).unwrap(), b"again\n");
        sweep(&directory, SystemTime::now());
        assert_eq!(read(&directory, acl, 100).unwrap(), b"again\n", "it is new");
        sweep(&directory, SystemTime::now() + KEPT + Duration::from_secs(60));
        assert_eq!(read(&directory, acl, 100).unwrap(), b"", "it is old");
        append(&directory, acl, "again\n").unwrap();
        remove(&directory, acl).unwrap();
        remove(&directory, acl).expect("twice is once");
        assert_eq!(read(&directory, acl, 100).unwrap(), b"");
    }
}
