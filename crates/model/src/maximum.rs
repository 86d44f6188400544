//! How far a virtual machine can grow without a new start: the most of its memory and of its processors, beside what it has now.
//! The memory is set aside at its start and held by its balloon; places for processors are kept free. Without these keys it is
//! set aside what it begins with.

use crate::{
    ByteSize, Config, Error, Result,
    board::Board,
    keys::{optional_flag, set},
    spec::{CpuLimit, MemoryLimit},
};
use std::collections::BTreeSet;

/// The most memory.
pub const MEMORY: &str = "limits.memory.maximum";
/// The most processors.
pub const CPUS: &str = "limits.cpu.maximum";
/// What a machine has that says nothing.
const UNSAID: ByteSize = ByteSize::gib(1);

/// Texts of rows.
pub(crate) mod text {
    pub(crate) const MEMORY: &str = "Memory that is set aside at the start, up to which limits.memory can grow while the machine runs; \
        its balloon holds the rest, as long as the guest in it does. Counts in the limits of a project.";
    pub(crate) const CPUS: &str = "Places for processors, up to which limits.cpu can grow while the machine runs; with \
        hardware.cpu.topology what that has.";
}

fn wrong(key: &str, text: String) -> Error {
    Error::invalid(format!("config.{key}"), text)
}

/// How many processors a limit means of a virtual machine.
pub fn count(limit: Option<&CpuLimit>) -> u32 {
    match limit {
        None => 1,
        Some(CpuLimit::Count { n }) => (*n).max(1),
        Some(CpuLimit::Set { cpus }) => (cpus.len() as u32).max(1),
    }
}

/// Refuses memory beyond what is set aside.
///
/// # Errors
/// Invalid, naming the key.
pub fn demand(most: ByteSize, memory: ByteSize) -> Result<()> {
    if memory <= most {
        return Ok(());
    }
    let text =
        format!("{most} is less than limits.memory, {memory}; raise it, for the next start, or lower that");
    Err(wrong(MEMORY, text))
}

/// Is this one of two keys that have to fit each other, of which one is among `changed`? A run that was given both by itself does not
/// keep one of them beside another's.
pub fn goes_with(key: &str, changed: &BTreeSet<String>) -> bool {
    let pairs = [[MEMORY, "limits.memory"], [CPUS, "limits.cpu"]];
    pairs.iter().any(|pair| pair.contains(&key) && pair.iter().any(|one| changed.contains(*one)))
}

/// The most memory out of an expanded configuration.
///
/// # Errors
/// Invalid, naming the key.
pub fn memory(config: &Config) -> Result<Option<ByteSize>> {
    set(config, MEMORY).map(|v| ByteSize::parse(&format!("config.{MEMORY}"), v)).transpose()
}

/// The most processors and memory out of an expanded configuration, which has this now.
///
/// # Errors
/// Invalid, naming the key: below what it has now, beside a topology of another number, and of memory without a balloon.
pub(crate) fn of(
    config: &Config,
    cpu: Option<&CpuLimit>,
    has: Option<MemoryLimit>,
) -> Result<(Option<u32>, Option<ByteSize>)> {
    let most = set(config, CPUS).and_then(|v| v.parse::<u32>().ok());
    if let Some(most) = most {
        let now = count(cpu);
        if most < now {
            let text = format!("{most} is less than limits.cpu, {now}; raise it, or lower that");
            return Err(wrong(CPUS, text));
        }
        let room = Board::of(config)?.topology.map(|t| t.processors());
        if let Some(room) = room.filter(|room| *room != most) {
            let text = format!("hardware.cpu.topology has {room} processors, not {most}; change one of them");
            return Err(wrong(CPUS, text));
        }
    }
    let size = memory(config)?;
    let Some(set_aside) = size else { return Ok((most, None)) };
    let all_of_it = match has.unwrap_or(MemoryLimit::Size { size: UNSAID }) {
        MemoryLimit::Size { size: now } => {
            demand(set_aside, now)?;
            now == set_aside
        }
        // What that is its host knows.
        MemoryLimit::Share { .. } => false,
    };
    if !all_of_it && optional_flag(config, "hardware.balloon") == Some(false) {
        let text = "what is beside limits.memory is held by a balloon, which this machine has not; unset hardware.balloon";
        return Err(wrong(MEMORY, text.to_owned()));
    }
    Ok((most, size))
}

#[cfg(test)]
mod tests {
    use super::{CPUS, MEMORY, goes_with};
    use crate::{ByteSize, Config, keys::limits};

    fn config(pairs: &[(&str, &str)]) -> Config {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn a_machine_has_at_most_what_is_set_aside() {
        let all = limits(&config(&[
            ("limits.cpu", "0-1"),
            ("limits.cpu.maximum", "4"),
            ("limits.memory", "512MiB"),
            ("limits.memory.maximum", "1GiB"),
        ]))
        .unwrap();
        assert_eq!((all.cpu_maximum, all.memory_maximum), (Some(4), Some(ByteSize::gib(1))));
        let none = limits(&config(&[("limits.cpu.maximum", ""), ("limits.memory.maximum", "")])).unwrap();
        assert_eq!((none.cpu_maximum, none.memory_maximum), (None, None));
        // Of one that says nothing of either.
        limits(&config(&[("limits.cpu.maximum", "1"), ("limits.memory.maximum", "1GiB")])).unwrap();
        for (pairs, field) in [
            (&[("limits.cpu", "3"), ("limits.cpu.maximum", "2")][..], "config.limits.cpu.maximum"),
            (&[("limits.memory.maximum", "512MiB")][..], "config.limits.memory.maximum"),
            (
                &[("limits.memory", "2GiB"), ("limits.memory.maximum", "1GiB")][..],
                "config.limits.memory.maximum",
            ),
            (
                &[("limits.memory.maximum", "2GiB"), ("hardware.balloon", "false")][..],
                "config.limits.memory.maximum",
            ),
            (
                &[("limits.cpu.maximum", "4"), ("hardware.cpu.topology", "sockets=1,cores=2")][..],
                "config.limits.cpu.maximum",
            ),
            // What is set aside is what a limit of QEMU's has to leave room for.
            (
                &[
                    ("limits.memory", "512MiB"),
                    ("limits.memory.maximum", "1GiB"),
                    ("limits.memory.hard", "1GiB"),
                ][..],
                "config.limits.memory.hard",
            ),
        ] {
            let e = limits(&config(pairs)).unwrap_err();
            assert_eq!(e.field.as_deref(), Some(field), "{pairs:?}: {e}");
        }
        // Without a balloon there is nothing to hold where both are the same.
        limits(&config(&[("limits.memory.maximum", "1GiB"), ("hardware.balloon", "false")])).unwrap();
    }

    #[test]
    fn keys_that_have_to_fit_each_other_change_together() {
        let changed = ["limits.memory".to_owned(), "user.x".to_owned()].into();
        assert!(goes_with(MEMORY, &changed) && goes_with("limits.memory", &changed));
        assert!(!goes_with(CPUS, &changed) && !goes_with("limits.memory.hard", &changed));
        assert!(!goes_with("user.x", &changed) && goes_with("limits.cpu", &[CPUS.to_owned()].into()));
    }

    #[test]
    fn a_share_of_the_host_is_within_what_is_set_aside() {
        let share = config(&[("limits.memory", "50%"), ("limits.memory.maximum", "1GiB")]);
        let mut all = limits(&share).unwrap();
        all.resolve_share(1 << 30).unwrap();
        assert_eq!(all.memory, Some(ByteSize::mib(512)));
        let e = limits(&share).unwrap().resolve_share(4 << 30).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("config.limits.memory.maximum"));
    }
}
