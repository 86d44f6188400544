//! What the system says of itself, from `/proc`, `/sys` and the kernel's own calls. What is missing is empty or 0.

use super::{Refused, failed};
use crate::message::{
    Bytes, Disk, Figures, Filesystem, Info, Interface, Interfaces, MEMORY_PARTS, MODES, Processor,
};
use std::{
    collections::BTreeMap,
    ffi::CStr,
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

/// Most of each kind that are told.
const MOST: usize = 64;

fn read(path: impl AsRef<Path>) -> String {
    fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
}

fn short(text: &str) -> String {
    text.chars().take(128).collect()
}

/// os-release(5): shell-like assignments.
fn os_release(text: &str) -> BTreeMap<&str, String> {
    let line = |l: &'_ str| -> Option<(usize, String)> {
        let (key, value) = l.split_once('=')?;
        let value = value.trim();
        let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''));
        let value = quote.and_then(|q| value.strip_prefix(q)?.strip_suffix(q)).unwrap_or(value);
        let mut plain = String::new();
        let mut chars = value.chars();
        while let Some(c) = chars.next() {
            plain.extend(if c == '\\' { chars.next() } else { Some(c) });
        }
        Some((key.len(), short(&plain)))
    };
    text.lines().filter_map(|l| line(l).map(|(n, v)| (l[..n].trim(), v))).collect()
}

pub(super) fn info() -> Result<Info, Refused> {
    let text = [read("/etc/os-release"), read("/usr/lib/os-release")].into_iter().find(|t| !t.is_empty());
    let text = text.unwrap_or_default();
    let os = os_release(&text);
    let get = |k: &str| os.get(k).cloned().unwrap_or_default();
    let hostname = short(read("/proc/sys/kernel/hostname").trim());
    let now = SystemTime::now();
    let time = match now.duration_since(UNIX_EPOCH) {
        Ok(d) => i64::try_from(d.as_nanos()).unwrap_or(i64::MAX),
        Err(e) => -i64::try_from(e.duration().as_nanos()).unwrap_or(i64::MAX),
    };
    Ok(Info {
        os: get("NAME"),
        os_version: get("VERSION_ID"),
        pretty_name: get("PRETTY_NAME"),
        kernel: short(read("/proc/sys/kernel/osrelease").trim()),
        fqdn: fqdn(&read("/etc/hosts"), &hostname),
        hostname,
        uptime: read("/proc/uptime").split(['.', ' ']).next().and_then(|s| s.parse().ok()).unwrap_or(0),
        time,
        program: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// The name in `/etc/hosts` that goes on where the host name ends; a resolver may take its time and is not asked.
fn fqdn(hosts: &str, hostname: &str) -> String {
    let names = hosts.lines().flat_map(|l| l.split('#').next().unwrap_or("").split_whitespace().skip(1));
    let longer = |n: &&str| n.strip_prefix(hostname).is_some_and(|rest| rest.starts_with('.'));
    short(names.into_iter().find(longer).unwrap_or(hostname))
}

pub(super) fn interfaces() -> Result<Interfaces, Refused> {
    let mut all: BTreeMap<String, Interface> = BTreeMap::new();
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: the list is the kernel's until it is given back below; each pointer is looked at only when it is there,
    // and an address only as the structure that its family says.
    unsafe {
        if libc::getifaddrs(&mut list) < 0 {
            return Err(failed(std::io::Error::last_os_error()));
        }
        let mut next = list;
        while let Some(entry) = next.as_ref() {
            next = entry.ifa_next;
            let name = short(&CStr::from_ptr(entry.ifa_name).to_string_lossy());
            if !all.contains_key(&name) && all.len() >= MOST {
                continue;
            }
            let i = all.entry(name.clone()).or_default();
            i.name = name;
            i.up = entry.ifa_flags & libc::IFF_UP as u32 != 0;
            i.loopback = entry.ifa_flags & libc::IFF_LOOPBACK as u32 != 0;
            let Some(family) = entry.ifa_addr.as_ref().map(|a| i32::from(a.sa_family)) else { continue };
            let prefix = |bytes: &[u8]| bytes.iter().map(|b| b.count_ones() as u8).sum::<u8>();
            let address = match family {
                libc::AF_INET => {
                    let ip = |a: *mut libc::sockaddr| {
                        (*a.cast::<libc::sockaddr_in>()).sin_addr.s_addr.to_ne_bytes()
                    };
                    let mask = if entry.ifa_netmask.is_null() { 32 } else { prefix(&ip(entry.ifa_netmask)) };
                    (Ipv4Addr::from(ip(entry.ifa_addr)).octets().to_vec(), mask)
                }
                libc::AF_INET6 => {
                    let ip = |a: *mut libc::sockaddr| (*a.cast::<libc::sockaddr_in6>()).sin6_addr.s6_addr;
                    let mask = if entry.ifa_netmask.is_null() { 128 } else { prefix(&ip(entry.ifa_netmask)) };
                    (Ipv6Addr::from(ip(entry.ifa_addr)).octets().to_vec(), mask)
                }
                _ => continue,
            };
            if i.addresses.len() < MOST {
                i.addresses.push((Bytes(address.0), address.1));
            }
        }
        libc::freeifaddrs(list);
    }
    for i in all.values_mut() {
        let dir = Path::new("/sys/class/net").join(&i.name);
        let number = |f: &str| read(dir.join(f)).trim().parse::<u64>().unwrap_or(0);
        i.mac = short(&read(dir.join("address")).trim().to_lowercase());
        i.mtu = number("mtu") as u32;
        i.counters = ["bytes", "packets", "errors", "dropped"]
            .into_iter()
            .flat_map(|what| ["rx", "tx"].map(|way| format!("statistics/{way}_{what}")))
            .map(|f| number(&f))
            .collect();
    }
    // Room for all of it in one frame: few guests have so many addresses, and they miss the last ones.
    let mut list: Vec<Interface> = all.into_values().collect();
    let size = |i: &Interface| 120 + i.name.len() + i.mac.len() + 25 * i.addresses.len();
    let mut room = 60_000;
    list.retain(|i| {
        let fits = size(i) <= room;
        room -= if fits { size(i) } else { 0 };
        fits
    });
    Ok(Interfaces { list })
}

/// A mounted file system.
pub(super) struct Mount {
    pub(super) point: String,
    pub(super) kind: String,
    pub(super) device: String,
    pub(super) writable: bool,
    /// Major and minor number.
    pub(super) number: String,
}

/// proc(5), mountinfo; octal escapes undone.
pub(super) fn parse_mounts(text: &str) -> Vec<Mount> {
    let unescape = |s: &str| {
        let bytes = s.as_bytes();
        let (mut out, mut i) = (vec![], 0);
        while i < bytes.len() {
            let octal = bytes.get(i + 1..i + 4).filter(|_| bytes[i] == b'\\');
            let octal = octal.and_then(|o| u8::from_str_radix(std::str::from_utf8(o).ok()?, 8).ok());
            out.push(octal.unwrap_or(bytes[i]));
            i += if octal.is_some() { 4 } else { 1 };
        }
        String::from_utf8_lossy(&out).into_owned()
    };
    let line = |l: &str| {
        let (left, right) = l.split_once(" - ")?;
        let (left, right): (Vec<&str>, Vec<&str>) = (left.split(' ').collect(), right.split(' ').collect());
        let writable = |options: &str| options.split(',').any(|o| o == "rw");
        Some(Mount {
            number: left.get(2)?.to_string(),
            point: unescape(left.get(4)?),
            kind: right.first()?.to_string(),
            device: unescape(right.get(1)?),
            writable: writable(left.get(5)?) && writable(right.get(2)?),
        })
    };
    text.lines().filter_map(line).collect()
}

/// File systems on devices, each once, in the order of mounting.
pub(super) fn mounts() -> Vec<Mount> {
    let mut seen = std::collections::HashSet::new();
    let mut mounts = parse_mounts(&read("/proc/self/mountinfo"));
    mounts.retain(|m| m.device.starts_with("/dev/") && seen.insert(m.number.clone()));
    mounts
}

pub(super) fn figures() -> Result<Figures, Refused> {
    let meminfo = read("/proc/meminfo");
    let memory = |key: &str| {
        let line = meminfo.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
    };
    let stat = read("/proc/stat");
    // SAFETY: plain call.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.max(1) as u64;
    let cpu = stat.lines().find_map(|l| l.strip_prefix("cpu ")).unwrap_or_default();
    let cpus = stat.lines().filter(|l| l.starts_with("cpu") && !l.starts_with("cpu ")).count();
    let load = read("/proc/loadavg");
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let is_pid =
        |name: &std::ffi::OsStr| name.to_str().is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()));
    Ok(Figures {
        memory: ["MemTotal", "MemAvailable", "MemFree", "Cached", "Buffers", "SwapTotal", "SwapFree"]
            .map(memory)
            .to_vec(),
        cpu: cpu
            .split_whitespace()
            .take(8)
            .map(|n| n.parse::<u64>().unwrap_or(0).saturating_mul(1_000_000_000 / ticks))
            .collect(),
        cpus: cpus as u32,
        load: load.split(' ').take(3).map(|n| n.parse::<f64>().map_or(0, |l| (l * 1000.0) as u64)).collect(),
        processes: pids.filter(|e| is_pid(&e.file_name())).count() as u64,
        filesystems: mounts().into_iter().take(MOST).filter_map(filesystem).collect(),
        disks: disks(&read("/proc/diskstats")),
        memory_parts: memory_parts(&meminfo),
        processors: processors(&stat, 1_000_000_000 / ticks),
        oom_kills: read("/proc/vmstat")
            .lines()
            .find_map(|l| l.strip_prefix("oom_kill ")?.trim().parse().ok()),
    })
}

/// In the order of [`MEMORY_PARTS`].
fn memory_parts(meminfo: &str) -> Vec<u64> {
    let number = |key: &str| {
        let line = meminfo.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    let bytes = |key: &str| number(key) << 10;
    let page = bytes("Hugepagesize");
    let part = |name: &&str| match *name {
        "Active_anon" => bytes("Active(anon)"),
        "Active_file" => bytes("Active(file)"),
        "Inactive_anon" => bytes("Inactive(anon)"),
        "Inactive_file" => bytes("Inactive(file)"),
        "HugepagesFree" => number("HugePages_Free").saturating_mul(page),
        "HugepagesTotal" => number("HugePages_Total").saturating_mul(page),
        "Swap" => bytes("SwapTotal").saturating_sub(bytes("SwapFree")),
        "RSS" => bytes("AnonPages"),
        other => bytes(other),
    };
    MEMORY_PARTS.iter().map(part).collect()
}

/// The lines of single CPUs in `/proc/stat`; a tick is so many nanoseconds.
fn processors(stat: &str, tick: u64) -> Vec<Processor> {
    let line = |l: &str| {
        let mut words = l.strip_prefix("cpu")?.split_whitespace();
        let number = words.next().filter(|_| !l.starts_with("cpu "))?.parse().ok()?;
        let times = words.take(MODES.len()).map(|n| n.parse::<u64>().unwrap_or(0).saturating_mul(tick));
        Some(Processor { number, times: times.collect() })
    };
    stat.lines().filter_map(line).take(MOST).collect()
}

fn filesystem(m: Mount) -> Option<Filesystem> {
    let s = rustix::fs::statvfs(m.point.as_str()).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(s.f_frsize);
    Some(Filesystem {
        bytes: vec![bytes(s.f_blocks), bytes(s.f_bfree), bytes(s.f_bavail)],
        inodes: vec![s.f_files, s.f_ffree],
        mount: short(&m.point),
        device: short(&m.device),
        kind: short(&m.kind),
    })
}

/// Kernel documentation, `admin-guide/iostats`: whole disks that were used.
fn disks(text: &str) -> Vec<Disk> {
    let line = |l: &str| {
        let f: Vec<&str> = l.split_whitespace().collect();
        let name = f.get(2)?;
        let number = |i: usize| f.get(i).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        let virtual_ = ["loop", "ram", "zram"].iter().any(|p| name.starts_with(p));
        let whole = Path::new("/sys/block").join(name.replace('/', "!")).exists();
        (whole && !virtual_ && number(3) + number(7) > 0).then(|| Disk {
            name: short(name),
            counters: vec![
                number(3),
                number(5).saturating_mul(512),
                number(7),
                number(9).saturating_mul(512),
            ],
        })
    };
    text.lines().filter_map(line).take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Wire;

    #[test]
    fn os_release_with_all_kinds_of_quotes() {
        let os = os_release("NAME=\"A \\\"b\\\" GNU/Linux\"\n# c\nVERSION_ID='12'\nID=debian\nbroken\n=x\n");
        assert_eq!(
            (os["NAME"].as_str(), os["VERSION_ID"].as_str(), os["ID"].as_str()),
            ("A \"b\" GNU/Linux", "12", "debian")
        );
    }

    #[test]
    fn names_of_hosts() {
        let hosts = "127.0.0.1 localhost\n# v1.no\n127.0.1.1\tv1.example.org v1 # v1.comment\n";
        assert_eq!(fqdn(hosts, "v1"), "v1.example.org");
        assert_eq!(fqdn(hosts, "v"), "v");
    }

    #[test]
    fn mounts_with_odd_names() {
        let text = "22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro\n\
                    30 22 254:2 / /mnt/a\\040b ro - xfs /dev/vdb rw\nnonsense\n31 22 0:5 / /proc rw - proc proc rw\n";
        let m = parse_mounts(text);
        assert_eq!(m.len(), 3);
        assert_eq!((m[1].point.as_str(), m[1].writable, m[0].writable), ("/mnt/a b", false, true));
    }

    #[test]
    fn each_processor_and_part_of_memory() {
        let stat = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 1 2 3 4 5 6 7 8 9 10\ncpu12 1 x\nintr 5\n";
        let all = processors(stat, 10);
        assert_eq!((all.len(), all[0].number, all[1].number), (2, 0, 12));
        assert_eq!(all[0].times, [10, 20, 30, 40, 50, 60, 70, 80]);
        assert_eq!(all[1].times, [10, 0]);
        let meminfo = "MemTotal: 9 kB\nActive: 3 kB\nActive(anon): 2 kB\nSwapTotal: 9 kB\nSwapFree: 4 kB\n\
                       HugePages_Total: 2\nHugepagesize: 2048 kB\n";
        let parts = memory_parts(meminfo);
        let part = |name: &str| parts[MEMORY_PARTS.iter().position(|n| *n == name).unwrap()];
        assert_eq!((part("Active"), part("Active_anon"), part("Swap")), (3 << 10, 2 << 10, 5 << 10));
        assert_eq!((part("HugepagesTotal"), part("Buffers")), (4 << 20, 0));
    }

    #[test]
    fn this_system() {
        let i = interfaces().unwrap();
        let lo = i.list.iter().find(|i| i.name == "lo").unwrap();
        assert!(lo.loopback);
        let f = figures().unwrap();
        assert!(f.memory[0] > 1 << 20 && f.cpu.len() == 8 && f.processes > 0 && f.cpus > 0, "{f:?}");
        assert!(f.processors.len() == (f.cpus as usize).min(MOST) && f.memory_parts[0] > 0, "{f:?}");
        assert!(f.encoded().len() < crate::wire::MAX_PAYLOAD);
        let info = info().unwrap();
        assert!(!info.kernel.is_empty() && info.time > 0);
    }
}
