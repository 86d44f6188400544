//! Bytes that a control group read from and wrote to block devices, as the kernel lists them.

use std::collections::BTreeMap;

/// Of all devices, out of lines such as `8:0 Read 4096`.
pub(super) fn v1(text: &str, what: &str) -> u64 {
    let of = |line: &str| {
        let mut words = line.split_whitespace();
        words.next()?;
        (words.next()? == what).then(|| words.next()?.parse::<u64>().ok())?
    };
    text.lines().filter_map(of).sum()
}

/// Of all devices, out of lines such as `8:0 rbytes=4096 wbytes=0 rios=1`.
pub(super) fn v2(text: &str, key: &str) -> u64 {
    text.split_whitespace().filter_map(|w| w.strip_prefix(key)?.parse::<u64>().ok()).sum()
}

/// Of each device by its numbers: bytes read, reads, bytes written, writes. Loop devices are left out: what they move is
/// moved on a disk too.
pub(super) type Devices = BTreeMap<String, [u64; 4]>;

const LOOPS: &str = "7:";

/// Out of lines such as `8:0 Read 4096`, once of bytes and once of requests.
pub(super) fn devices_v1(bytes: &str, requests: &str) -> Devices {
    let mut found = Devices::new();
    for (text, read, written) in [(bytes, 0, 2), (requests, 1, 3)] {
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(device), Some(what), Some(n)) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            let at = match what {
                "Read" => read,
                "Write" => written,
                _ => continue,
            };
            if let Ok(n) = n.parse::<u64>()
                && device.contains(':')
                && !device.starts_with(LOOPS)
            {
                found.entry(device.to_owned()).or_default()[at] = n;
            }
        }
    }
    found
}

/// Out of lines such as `8:0 rbytes=4096 wbytes=0 rios=1 wios=0`. Some kernels name several devices in one line, of which
/// the last has the figures.
pub(super) fn devices_v2(text: &str) -> Devices {
    let mut found = Devices::new();
    for line in text.lines() {
        let mut device = "";
        for word in line.split_whitespace() {
            let Some((key, n)) = word.split_once('=') else {
                device = word;
                continue;
            };
            let at = ["rbytes", "rios", "wbytes", "wios"].iter().position(|k| *k == key);
            if let (Some(at), Ok(n)) = (at, n.parse::<u64>())
                && device.contains(':')
                && !device.starts_with(LOOPS)
            {
                found.entry(device.to_owned()).or_default()[at] = n;
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_disks_are_summed() {
        let old = "8:0 Read 4096\n8:0 Write 512\n8:0 Total 4608\n259:1 Read 4\nTotal 4612\n";
        assert_eq!((v1(old, "Read"), v1(old, "Write"), v1("", "Read")), (4100, 512, 0));
        let new = "8:0 rbytes=4096 wbytes=512 rios=1 wios=1\n8:16 \n259:1 rbytes=4 wbytes=x dbytes=9\n";
        assert_eq!((v2(new, "rbytes="), v2(new, "wbytes=")), (4100, 512));
    }

    #[test]
    fn each_device_has_its_own() {
        let bytes = "8:0 Read 4096\n8:0 Write 512\n8:0 Total 4608\n7:1 Read 9\nTotal 4617\n";
        let requests = "8:0 Read 3\n8:0 Write 1\n259:1 Read x\n";
        assert_eq!(devices_v1(bytes, requests), Devices::from([("8:0".into(), [4096, 3, 512, 1])]));
        let new =
            "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5\n8:16 \n8:32 8:48 rbytes=7 wios=x\n7:0 rbytes=1\n";
        let found = Devices::from([("8:0".into(), [1, 3, 2, 4]), ("8:48".into(), [7, 0, 0, 0])]);
        assert_eq!(devices_v2(new), found);
    }
}
