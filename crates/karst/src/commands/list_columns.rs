//! The columns of `list`.

use std::collections::BTreeMap;

use crate::{
    client::{Instance, types::State},
    error::{Error, Result},
    output::units,
};

/// Their letters, for `--help`.
pub const COLUMNS_HELP: &str = "Columns, a letter each: n name, s state, t type, 4 IPv4, 6 IPv6, u CPU time, m memory, M memory \
of the limit in percent, D disk, a architecture, b storage pool, c created, d description, e project, f base image, \
F base image (full), l last used, L location, N processes, p PID, P profiles, r reason of a halt or \
crash, S snapshots, U started; \
KEY[:NAME] of a configuration key, separated by commas";

/// A column of the table.
pub struct Column {
    /// Heading.
    pub title: String,
    /// Configuration key, for columns of keys.
    key: String,
    /// Whether it needs `recursion=2`.
    pub needs_state: bool,
    /// The text for an instance.
    pub cell: fn(&Column, &Instance) -> String,
}

impl Column {
    /// The column of a letter.
    pub fn of(letter: char) -> Option<Self> {
        let (title, needs_state, cell): (&str, bool, fn(&Self, &Instance) -> String) = match letter {
            'n' => ("NAME", false, |_, i| i.name.clone()),
            's' => ("STATE", false, |_, i| i.status.to_uppercase()),
            't' => ("TYPE", false, |_, i| {
                let kind = i.kind.to_uppercase();
                if i.ephemeral { format!("{kind} (EPHEMERAL)") } else { kind }
            }),
            '4' => ("IPV4", true, |_, i| addresses(i.state.as_ref(), "inet")),
            '6' => ("IPV6", true, |_, i| addresses(i.state.as_ref(), "inet6")),
            'u' => ("CPU TIME", true, |_, i| units::cpu_seconds(i.state.as_ref().map_or(0, |s| s.cpu.usage))),
            'm' => {
                ("MEMORY", true, |_, i| units::known_bytes(i.state.as_ref().map_or(0, |s| s.memory.usage)))
            }
            'M' => ("MEMORY%", true, |_, i| memory_percent(i.state.as_ref())),
            'D' => ("DISK", true, |_, i| {
                units::known_bytes(
                    i.state.as_ref().and_then(|s| s.disk.get("root")).map_or(0, |disk| disk.usage),
                )
            }),
            'a' => ("ARCHITECTURE", false, |_, i| i.architecture.clone()),
            'b' => ("STORAGE POOL", false, |_, i| root_pool(&i.expanded_devices)),
            'c' => ("CREATED AT", false, |_, i| units::time(&i.created_at)),
            'd' => ("DESCRIPTION", false, |_, i| i.description.clone()),
            'e' => ("PROJECT", false, |_, i| i.project.clone()),
            'f' => ("BASE IMAGE", false, |_, i| units::short(config(i, "volatile.base_image")).to_owned()),
            'F' => ("BASE IMAGE", false, |_, i| config(i, "volatile.base_image").to_owned()),
            'l' => ("LAST USED AT", false, |_, i| units::time(&i.last_used_at)),
            'L' => ("LOCATION", false, |_, i| i.location.clone()),
            'N' => ("PROCESSES", true, |_, i| positive(i.state.as_ref().map_or(0, |s| s.processes))),
            'p' => ("PID", true, |_, i| positive(i.state.as_ref().map_or(0, |s| s.pid))),
            'P' => ("PROFILES", false, |_, i| i.profiles.join("\n")),
            'r' => {
                ("REASON", true, |_, i| i.state.as_ref().map(|s| s.karst_reason.clone()).unwrap_or_default())
            }
            'S' => ("SNAPSHOTS", true, |_, i| i.snapshots.len().to_string()),
            'U' => ("STARTED AT", true, |_, i| {
                i.state.as_ref().map(|s| units::time(&s.started_at)).unwrap_or_default()
            }),
            _ => return None,
        };
        Some(Self { title: title.to_owned(), key: String::new(), needs_state, cell })
    }

    fn of_key(text: &str) -> Self {
        let (key, title) = match text.rsplit_once(':') {
            Some((key, title)) if !title.is_empty() => (key, title.to_owned()),
            _ => (text.trim_end_matches(':'), text.trim_end_matches(':').to_uppercase()),
        };
        Self {
            title,
            key: key.to_owned(),
            needs_state: false,
            cell: |column, i| config(i, &column.key).to_owned(),
        }
    }
}

/// `nst46`, or the same with configuration keys, separated by commas.
pub fn parse_columns(text: &str) -> Result<Vec<Column>> {
    let mut columns = Vec::new();
    for word in text.split(',').filter(|word| !word.is_empty()) {
        if word.contains('.') {
            columns.push(Column::of_key(word));
            continue;
        }
        for letter in word.chars() {
            columns.push(Column::of(letter).ok_or_else(|| {
                Error::Usage(format!("there is no column \"{letter}\" (karst list --help names them)"))
            })?);
        }
    }
    if columns.is_empty() { Err(Error::Usage("no columns".to_owned())) } else { Ok(columns) }
}

/// A key with what the profiles give.
pub fn config<'a>(instance: &'a Instance, key: &str) -> &'a str {
    instance.expanded_config.get(key).map_or("", String::as_str)
}

fn positive(value: i64) -> String {
    if value > 0 { value.to_string() } else { String::new() }
}

/// The addresses of a family that others can reach, one a line, with their interface.
fn addresses(state: Option<&State>, family: &str) -> String {
    let mut lines = Vec::new();
    for (interface, nic) in state.iter().flat_map(|state| &state.network) {
        let reachable = |scope: &str| !matches!(scope, "link" | "local");
        let own = nic
            .addresses
            .iter()
            .filter(|a| a.family == family && nic.kind != "loopback" && reachable(&a.scope));
        lines.extend(own.map(|address| format!("{} ({interface})", address.address)));
    }
    lines.join("\n")
}

fn memory_percent(state: Option<&State>) -> String {
    match state.map(|state| &state.memory) {
        Some(memory) if memory.total > 0 && memory.usage > 0 => {
            format!("{:.1}%", memory.usage as f64 * 100.0 / memory.total as f64)
        }
        _ => String::new(),
    }
}

fn root_pool(devices: &BTreeMap<String, BTreeMap<String, String>>) -> String {
    let is = |device: &BTreeMap<String, String>, key: &str, value: &str| {
        device.get(key).is_some_and(|v| v == value)
    };
    let root = devices.values().find(|device| is(device, "type", "disk") && is(device, "path", "/"));
    root.and_then(|device| device.get("pool")).cloned().unwrap_or_default()
}
