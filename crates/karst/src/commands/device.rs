//! Devices of instances and profiles: changed together with the ETag that they were read with.

use serde_json::{Map, Value, json};

use super::{
    completion::complete_named,
    object::{Object, parse_pairs, parse_settings},
};
use crate::{
    context::Context,
    error::{Error, Result},
    output::{self, member, to_yaml},
};

/// Whose devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// An instance's own.
    Instance,
    /// A profile's.
    Profile,
}

/// `... device ...`
#[derive(Debug, clap::Subcommand)]
pub enum Device {
    /// Add a device
    Add {
        /// Instance or profile
        #[arg(add = complete_named())]
        owner: String,
        /// Name of the device
        device: String,
        /// nic, disk, gpu, usb, ...
        #[arg(value_name = "TYPE")]
        kind: String,
        /// Its keys
        #[arg(value_name = "KEY=VALUE")]
        keys: Vec<String>,
    },
    /// Remove devices
    #[command(visible_alias = "rm")]
    Remove {
        /// Instance or profile
        #[arg(add = complete_named())]
        owner: String,
        /// Names of devices
        #[arg(required = true)]
        devices: Vec<String>,
    },
    /// List names of devices
    List {
        /// Instance or profile
        #[arg(add = complete_named())]
        owner: String,
    },
    /// Show all devices as YAML
    Show {
        /// Instance or profile
        #[arg(add = complete_named())]
        owner: String,
    },
    /// Print the value of a key
    Get {
        /// Instance or profile
        #[arg(add = complete_named())]
        owner: String,
        /// Name of the device
        device: String,
        /// Key
        key: String,
    },
    /// Set keys
    Set {
        /// Instance or profile
        #[arg(add = complete_named())]
        owner: String,
        /// Name of the device
        device: String,
        /// Keys
        #[arg(required = true, value_name = "KEY=VALUE")]
        keys: Vec<String>,
    },
    /// Remove a key
    Unset {
        /// Instance or profile
        #[arg(add = complete_named())]
        owner: String,
        /// Name of the device
        device: String,
        /// Key
        key: String,
    },
    /// Copy a device of a profile into the instance, with changes
    Override {
        /// Instance
        #[arg(add = complete_named())]
        owner: String,
        /// Name of the device
        device: String,
        /// Keys to change
        #[arg(value_name = "KEY=VALUE")]
        keys: Vec<String>,
    },
}

impl Device {
    fn owner(&self) -> &str {
        match self {
            Self::Add { owner, .. }
            | Self::Remove { owner, .. }
            | Self::List { owner }
            | Self::Show { owner }
            | Self::Get { owner, .. }
            | Self::Set { owner, .. }
            | Self::Unset { owner, .. }
            | Self::Override { owner, .. } => owner,
        }
    }

    /// Runs it.
    pub async fn run(self, context: &Context, owner: Owner) -> Result<()> {
        let object = match owner {
            Owner::Instance => super::config::instance(self.owner()),
            Owner::Profile => super::profile::profile(self.owner()),
        };
        let answer = object.get(context).await?;
        let devices = members(&answer.metadata, "devices");
        match &self {
            Self::List { .. } => {
                return output::print(&devices.keys().map(|name| format!("{name}\n")).collect::<String>());
            }
            Self::Show { .. } => return output::print(&to_yaml(&Value::Object(devices))?),
            Self::Get { device, key, .. } => {
                return output::line(&member(find(&object, &answer.metadata, device)?, key));
            }
            _ => {}
        }
        let changed = self.change(&object, &answer.metadata, devices)?;
        let mut body = object.writable(&answer.metadata);
        body.insert("devices".to_owned(), Value::Object(changed));
        object.put(context, body, answer.etag.as_deref()).await
    }

    /// The devices as they shall be.
    fn change(
        self,
        object: &Object,
        before: &Value,
        mut devices: Map<String, Value>,
    ) -> Result<Map<String, Value>> {
        match self {
            Self::Add { device, kind, keys, .. } => {
                if devices.contains_key(&device) {
                    return Err(Error::Local(format!(
                        "{} \"{}\" already has a device \"{device}\"",
                        object.kind.noun(),
                        object.name
                    )));
                }
                let mut added = json!({"type": kind});
                set(&mut added, parse_pairs(&keys)?);
                devices.insert(device, added);
            }
            Self::Remove { devices: names, .. } => {
                for name in names {
                    find(object, before, &name)?;
                    devices.shift_remove(&name);
                }
            }
            Self::Set { device, keys, .. } => {
                let mut changed = find(object, before, &device)?.clone();
                set(&mut changed, parse_settings(&keys)?);
                devices.insert(device, changed);
            }
            Self::Unset { device, key, .. } => {
                let mut changed = find(object, before, &device)?.clone();
                let removed = changed.as_object_mut().and_then(|keys| keys.shift_remove(&key));
                if removed.is_none() {
                    return Err(Error::Local(format!("device \"{device}\" has no key \"{key}\"")));
                }
                devices.insert(device, changed);
            }
            Self::Override { device, keys, .. } => {
                if devices.contains_key(&device) {
                    return Err(Error::Local(format!(
                        "instance \"{}\" has its own device \"{device}\" already",
                        object.name
                    )));
                }
                let Some(mut copied) = members(before, "expanded_devices").get(&device).cloned() else {
                    return Err(Error::Local(format!(
                        "no profile of instance \"{}\" has a device \"{device}\"",
                        object.name
                    )));
                };
                set(&mut copied, parse_pairs(&keys)?);
                devices.insert(device, copied);
            }
            Self::List { .. } | Self::Show { .. } | Self::Get { .. } => {}
        }
        Ok(devices)
    }
}

fn set(device: &mut Value, keys: Vec<(String, String)>) {
    for (key, value) in keys {
        device[key] = json!(value);
    }
}

fn members(object: &Value, name: &str) -> Map<String, Value> {
    object.get(name).and_then(Value::as_object).cloned().unwrap_or_default()
}

/// A device of the object's own; one that comes from a profile is pointed out.
fn find<'a>(object: &Object, value: &'a Value, device: &str) -> Result<&'a Value> {
    if let Some(found) = value.get("devices").and_then(|devices| devices.get(device)) {
        return Ok(found);
    }
    let inherited = value.get("expanded_devices").and_then(|devices| devices.get(device)).is_some();
    Err(Error::Local(if inherited {
        format!(
            "device \"{device}\" comes from a profile (karst config device override {} {device} KEY=VALUE makes a copy)",
            object.name
        )
    } else {
        format!("{} \"{}\" has no device \"{device}\"", object.kind.noun(), object.name)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn before() -> Value {
        json!({"devices": {"data": {"type": "disk", "path": "/data"}},
               "expanded_devices": {"data": {"type": "disk", "path": "/data"}, "root": {"type": "disk", "path": "/"}}})
    }

    fn change(command: Device) -> Result<Value> {
        let before = before();
        let devices = members(&before, "devices");
        command.change(&super::super::config::instance("c1"), &before, devices).map(Value::Object)
    }

    fn own(text: &str) -> String {
        text.to_owned()
    }

    #[test]
    fn override_copies_from_the_profile() {
        let changed =
            change(Device::Override { owner: own("c1"), device: own("root"), keys: vec![own("size=5GiB")] })
                .unwrap();
        assert_eq!(changed["root"], json!({"type": "disk", "path": "/", "size": "5GiB"}));
    }

    #[test]
    fn a_profiles_device_is_pointed_out() {
        let error = change(Device::Set { owner: own("c1"), device: own("root"), keys: vec![own("size=1")] })
            .unwrap_err();
        assert!(error.to_string().contains("override c1 root"), "{error}");
        assert!(change(Device::Remove { owner: own("c1"), devices: vec![own("nope")] }).is_err());
        let changed = change(Device::Remove { owner: own("c1"), devices: vec![own("data")] }).unwrap();
        assert_eq!(changed, json!({}));
        let twice = Device::Add { owner: own("c1"), device: own("data"), kind: own("disk"), keys: vec![] };
        assert!(change(twice).is_err());
    }
}
