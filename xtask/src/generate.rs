//! Documents that are made of the code, checked in, and compared in CI.

use crate::root;
use karst_model::{
    keys::{INSTANCE_KEYS, Key, KeyScope, KeyType},
    storage::{POOL_KEYS, PoolKind, VOLUME_KEYS},
};
use std::fs;

/// Writes or compares all documents; answers the stale ones.
pub fn run(check: bool) -> Vec<String> {
    let mut faults = vec![];
    let documents = [
        ("docs/reference/instance-keys.md", instance_keys()),
        ("docs/reference/storage-keys.md", storage_keys()),
    ];
    for (name, text) in documents {
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
