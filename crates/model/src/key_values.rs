//! Values of keys that are more than a word or a number, from what users write to what is meant.

use crate::{
    ByteSize, Config, Error, Result,
    keys::set,
    spec::{self, CpuAllowance, CpuLimit, MemoryLimit, SwapLimit},
};

/// A truth value out of an expanded configuration; `None` when it is not set.
pub fn optional_flag(config: &Config, key: &str) -> Option<bool> {
    parse_bool(key, set(config, key)?).ok()
}

/// A boolean of an expanded configuration; `false` when it is not set.
pub fn flag(config: &Config, key: &str) -> Result<bool> {
    set(config, key).map_or(Ok(false), |v| parse_bool(&format!("config.{key}"), v))
}

/// Parses a boolean.
pub fn parse_bool(field: &str, s: &str) -> Result<bool> {
    match s.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err(Error::invalid(field, format!("{s:?} is not a boolean; use true or false"))),
    }
}

/// Parses `limits.cpu`.
pub fn parse_cpus(field: &str, s: &str) -> Result<CpuLimit> {
    let wrong =
        || Error::invalid(field, format!("{s:?} is neither a number of CPUs nor a set such as 0-1,3"));
    if let Ok(n) = s.parse::<u32>() {
        return if (1..=4096).contains(&n) {
            Ok(CpuLimit::Count { n })
        } else {
            Err(Error::invalid(field, format!("{s:?} is not a number of CPUs from 1 to 4096")))
        };
    }
    Ok(CpuLimit::Set { cpus: parse_set(s, 4095).ok_or_else(wrong)? })
}

/// `0-1,3`: sorted numbers up to `largest`; none for anything else.
pub(crate) fn parse_set(s: &str, largest: u32) -> Option<Vec<u32>> {
    let mut set = std::collections::BTreeSet::new();
    for part in s.split(',') {
        let (a, b) = part.split_once('-').unwrap_or((part, part));
        let (a, b): (u32, u32) = (a.trim().parse().ok()?, b.trim().parse().ok()?);
        if a > b || b > largest {
            return None;
        }
        set.extend(a..=b);
    }
    Some(set.into_iter().collect())
}

/// Parses `limits.cpu.nodes`.
pub fn parse_nodes(field: &str, s: &str) -> Result<Vec<u32>> {
    let wrong = || Error::invalid(field, format!("{s:?} is no set of NUMA nodes such as 0 or 0-1,3"));
    parse_set(s, 1023).ok_or_else(wrong)
}

/// Parses `limits.cpu.allowance`.
pub fn parse_allowance(field: &str, s: &str) -> Result<CpuAllowance> {
    let wrong = || {
        Error::invalid(field, format!("{s:?} is neither a share such as 50% nor a limit such as 25ms/100ms"))
    };
    if let Some(p) = s.strip_suffix('%') {
        return match p.parse() {
            Ok(percent) if (1..=100).contains(&percent) => Ok(CpuAllowance::Share { percent }),
            _ => Err(wrong()),
        };
    }
    // In milliseconds, or finer.
    let us = |t: &str, most: u64| {
        let t = t.trim();
        let (digits, factor) = match (t.strip_suffix("ms"), t.strip_suffix("us")) {
            (Some(digits), _) => (digits, 1000),
            (None, digits) => (digits?, 1),
        };
        digits.parse::<u64>().ok()?.checked_mul(factor).filter(|us| (1000..=most).contains(us))
    };
    let (q, p) = s.split_once('/').ok_or_else(wrong)?;
    match (us(q, 1_000_000_000), us(p, 1_000_000)) {
        (Some(quota_us), Some(period_us)) => Ok(CpuAllowance::Quota { quota_us, period_us }),
        _ => Err(wrong()),
    }
}

/// Parses `limits.memory`.
pub fn parse_memory(field: &str, s: &str) -> Result<MemoryLimit> {
    if let Some(percent) = s.trim().strip_suffix('%') {
        let percent = percent.parse::<u32>().ok().filter(|p| (1..=100).contains(p));
        let percent = percent.ok_or_else(|| {
            let text =
                format!("{s:?} is no share of the host's memory; write a whole number from 1% to 100%");
            Error::invalid(field, text)
        })?;
        return Ok(MemoryLimit::Share { percent });
    }
    Ok(MemoryLimit::Size { size: ByteSize::parse(field, s)? })
}

/// What a guest can begin with at all.
pub(crate) fn demand_memory(field: &str, size: ByteSize) -> Result<()> {
    if size < ByteSize::mib(4) {
        let text = format!("{size} of memory is too little for any guest; give at least 4MiB");
        return Err(Error::invalid(field, text));
    }
    Ok(())
}

/// Parses `limits.memory.swap`.
pub fn parse_swap(field: &str, s: &str) -> Result<SwapLimit> {
    match parse_bool(field, s) {
        Ok(true) => Ok(SwapLimit::Allowed),
        Ok(false) => Ok(SwapLimit::Forbidden),
        Err(_) => match ByteSize::parse(field, s) {
            Ok(size) => Ok(SwapLimit::Bytes { bytes: size.bytes() }),
            Err(_) => {
                Err(Error::invalid(field, format!("{s:?} is neither true, false nor a size such as 512MiB")))
            }
        },
    }
}

/// Parses `limits.kernel.*`.
pub fn parse_kernel_limit(field: &str, s: &str) -> Result<spec::KernelLimit> {
    let wrong = || {
        Error::invalid(
            field,
            format!("{s:?} is no limit; write a number, soft:hard with soft not above hard, or unlimited"),
        )
    };
    let one = |t: &str| match t.trim() {
        "unlimited" => Ok(None),
        n => n.parse::<u64>().map(Some).map_err(|_| wrong()),
    };
    let (soft, hard) = s.split_once(':').unwrap_or((s, s));
    let limit = spec::KernelLimit { soft: one(soft)?, hard: one(hard)? };
    match (limit.soft, limit.hard) {
        (None, Some(_)) => Err(wrong()),
        (Some(soft), Some(hard)) if soft > hard => Err(wrong()),
        _ => Ok(limit),
    }
}
