//! Documents that are made of the code, checked in, and compared in CI.

use crate::{pages, root};
use karst_model::{
    device::{DISK_KEYS, NIC_KEYS, PORT_KEYS, nic_kinds},
    keys::{INSTANCE_KEYS, Key, KeyScope, KeyType},
    network::BRIDGE_KEYS,
    project::{FEATURES, LIMITS, REFUSED, RESTRICTIONS, SETTINGS, text_of},
    server_keys::SERVER_KEYS,
    storage::{POOL_KEYS, PoolKind, VOLUME_KEYS},
    uplink::UPLINK_KEYS,
};
use std::fs;

/// Writes or compares all documents; answers the stale ones.
pub fn run(check: bool) -> Vec<String> {
    let mut faults = vec![];
    let host_policy = pages::host_policy().unwrap_or_else(|e| {
        faults.push(e);
        String::new()
    });
    let documents = [
        ("docs/reference/instance-keys.md", instance_keys()),
        ("docs/reference/storage-keys.md", storage_keys()),
        ("docs/reference/network-keys.md", network_keys()),
        ("docs/reference/nic-keys.md", nic_keys()),
        ("docs/reference/port-keys.md", port_keys()),
        ("docs/reference/disk-keys.md", disk_keys()),
        ("docs/reference/project-keys.md", project_keys()),
        ("docs/reference/server-keys.md", server_keys()),
        ("docs/reference/device-keys.md", pages::device_keys()),
        ("docs/reference/host-policy.md", host_policy),
    ];
    // One that could not be made stays as it was.
    for (name, text) in documents.into_iter().filter(|(_, text)| !text.is_empty()) {
        let path = root().join(name);
        if fs::read_to_string(&path).unwrap_or_default() == text {
            continue;
        }
        if check {
            faults.push(format!("{name} is stale; run `cargo xtask gen`"));
        } else if let Err(e) = fs::create_dir_all(path.parent().expect("a file lies in a directory"))
            .and_then(|()| fs::write(&path, text))
        {
            faults.push(format!("{name}: {e}"));
        }
    }
    faults
}

fn storage_keys() -> String {
    let mut text = String::from(
        "# Configuration keys of storage\n\nMade of `crates/model/src/storage.rs` by `cargo xtask gen`.\n\n\
         ## Pools\n\n| key | drivers | default | what it does |\n|---|---|---|---|\n",
    );
    for key in POOL_KEYS {
        let kinds = PoolKind::ALL.iter().filter(|k| key.kinds.contains(k));
        let kinds = kinds.map(|k| k.as_str()).collect::<Vec<_>>().join(", ");
        text.push_str(&format!("| `{}` | {kinds} | {} | {} |\n", key.name, key.default, key.text));
    }
    text.push_str("| `user.*` | all | | Yours. |\n\n## Custom volumes\n\n");
    for key in VOLUME_KEYS {
        text.push_str(&format!("- `{key}`\n"));
    }
    text
}

/// Begins a page.
fn page(of: &str, made_of: &str) -> String {
    format!(
        "# Configuration keys of {of}\n\nMade of `crates/model/src/{made_of}.rs` by `cargo xtask gen`.\n\n"
    )
}

/// A table of keys and texts.
fn table(text: &mut String, keys: &[(&str, &str)]) {
    text.push_str("| key | what it does |\n|---|---|\n");
    for (name, what) in keys {
        text.push_str(&format!("| `{name}` | {what} |\n"));
    }
    text.push_str("| `user.*` | Yours. |\n");
}

fn network_keys() -> String {
    let mut text = page("networks", "network");
    text.push_str("## Bridges\n\n");
    table(&mut text, BRIDGE_KEYS);
    text.push_str("\n## Interfaces of the host (macvlan, physical)\n\n");
    table(&mut text, UPLINK_KEYS);
    text
}

fn nic_keys() -> String {
    let mut text = page("NICs", "device/nic_keys");
    let kinds: Vec<_> = nic_kinds().collect();
    text.push_str(
        "A NIC on a network (`network=NAME`) has those of `bridged`, or of what the network is.\n\n",
    );
    text.push_str("| key | nictype | what it does |\n|---|---|---|\n");
    for (name, what) in NIC_KEYS {
        let of: Vec<_> =
            kinds.iter().filter(|(_, keys)| keys.contains(name)).map(|(kind, _)| *kind).collect();
        let of = if of.len() == kinds.len() { "all".to_owned() } else { of.join(", ") };
        text.push_str(&format!("| `{name}` | {of} | {what} |\n"));
    }
    text
}

fn port_keys() -> String {
    let mut text = page("ports of virtual machines", "device/port");
    text.push_str("| key | what it does |\n|---|---|\n");
    for (name, what) in PORT_KEYS {
        text.push_str(&format!("| `{name}` | {what} |\n"));
    }
    text
}

fn disk_keys() -> String {
    let mut text = page("disks", "device/disk_keys");
    text.push_str("| key | of | what it does |\n|---|---|---|\n");
    for (name, root, others, what) in DISK_KEYS {
        let of = match (root, others) {
            (true, false) => "the root disk",
            (false, true) => "other disks",
            _ => "all",
        };
        text.push_str(&format!("| `{name}` | {of} | {what} |\n"));
    }
    text
}

fn project_keys() -> String {
    let mut text = page("projects", "project");
    text.push_str("## What it has of its own\n\n| key | in a new project | what it does |\n|---|---|---|\n");
    for (name, new) in FEATURES {
        text.push_str(&format!("| `{name}` | {new} | {} |\n", text_of(name)));
    }
    text.push_str("\n## Limits\n\nNever passed, also not by two creations at once.\n\n");
    text.push_str("| key | is a | of what |\n|---|---|---|\n");
    for (name, kind) in LIMITS {
        text.push_str(&format!("| `{name}` | {kind} | {} |\n", text_of(name)));
    }
    text.push_str(
        "\n## Restrictions\n\n| key | values | without it | what it restricts |\n|---|---|---|---|\n",
    );
    text.push_str(&format!("| `restricted` | `true`, `false` | false | {} |\n", text_of("restricted")));
    for (name, values, default) in RESTRICTIONS {
        let words: Vec<_> = values.iter().map(|v| format!("`{v}`")).collect();
        let words = if words.is_empty() { "names".to_owned() } else { words.join(", ") };
        let default = if default.is_empty() { "all" } else { *default };
        text.push_str(&format!("| `{name}` | {words} | {default} | {} |\n", text_of(name)));
    }
    text.push_str("| `user.*` | text | | Yours. |\n");
    text.push_str(
        "\n## Settings\n\nWithout them it is as the server has it.\n\n| key | what it does |\n|---|---|\n",
    );
    for name in SETTINGS {
        text.push_str(&format!("| `{name}` | {} |\n", text_of(name)));
    }
    text.push_str("\n## Not here\n\nKeys of Incus that are refused.\n\n| key | why |\n|---|---|\n");
    for (name, why) in REFUSED {
        text.push_str(&format!("| `{name}` | {why} |\n"));
    }
    text
}

fn server_keys() -> String {
    let mut text = page("the server", "server_keys");
    table(&mut text, SERVER_KEYS);
    text
}

fn instance_keys() -> String {
    let mut text = String::from(
        "# Configuration keys of instances\n\nMade of `crates/model/src/keys.rs` by `cargo xtask gen`.\n\n\
         | key | for | values | default | live | what it does |\n|---|---|---|---|---|---|\n",
    );
    for key in INSTANCE_KEYS {
        let Key { name, default, text: what, .. } = key;
        let scope = match key.scope {
            KeyScope::Any => "both",
            KeyScope::Container => "containers",
            KeyScope::VirtualMachine => "virtual machines",
        };
        let values = match key.kind {
            KeyType::Text => "text".to_owned(),
            KeyType::Bool => "`true`, `false`".to_owned(),
            KeyType::Integer(low, high) => format!("{low} to {high}"),
            KeyType::Size => "size (`512MiB`)".to_owned(),
            KeyType::Memory => "size or share (`512MiB`, `50%`)".to_owned(),
            KeyType::Cpus => "number or set (`2`, `0-1,3`)".to_owned(),
            KeyType::Nodes => "set (`0`, `0-1,3`)".to_owned(),
            KeyType::Swap => "`true`, `false` or size".to_owned(),
            KeyType::KernelLimit => "`1024`, `1024:4096`, `unlimited`".to_owned(),
            KeyType::Allowance => "`50%` or `25ms/100ms`".to_owned(),
            KeyType::Schedule => "cron (`0 6 * * *`) or `@daily`".to_owned(),
            KeyType::Span => "time (`2w 3d`)".to_owned(),
            KeyType::Pattern => "name with `%d` or a date".to_owned(),
            KeyType::OneOf(words) => words.iter().map(|w| format!("`{w}`")).collect::<Vec<_>>().join(", "),
        };
        let live = if key.live { "yes" } else { "at the next start" };
        text.push_str(&format!("| `{name}` | {scope} | {values} | {default} | {live} | {what} |\n"));
    }
    text
}
