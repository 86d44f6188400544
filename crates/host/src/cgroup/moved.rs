//! Bytes that a control group read from and wrote to block devices, as the kernel lists them.

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
}
