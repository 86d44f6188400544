//! What a guest's own API shows: the file that the host writes and the server of the guest reads at each request. Text in
//! the format of the other files, replaced by rename, so that a reader sees one state of it.

use crate::text;
use std::collections::BTreeMap;

/// First line.
pub const HEADER: &[u8] = b"karst-guest-data 1\n";
/// Its name in the data directory.
pub const FILE: &str = "data";
/// The file in which the server keeps what the guest says of itself: `Ready`, or empty.
pub const STATE: &str = "state";
/// Largest file that is read.
pub const LARGEST: u64 = 16 << 20;

/// What is shown.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GuestData {
    /// `container`.
    pub instance_type: String,
    /// Name of the host.
    pub location: String,
    /// cloud-init's meta data.
    pub meta_data: String,
    /// `user.*` and `cloud-init.*`.
    pub config: BTreeMap<String, String>,
    /// Devices by name, each an object of JSON.
    pub devices: BTreeMap<String, String>,
}

impl GuestData {
    /// The file's content.
    pub fn render(&self) -> Vec<u8> {
        let mut out = HEADER.to_vec();
        let mut put = |k: &str, v: &str| text::put(&mut out, k, v.as_bytes());
        put("instance-type", &self.instance_type);
        put("location", &self.location);
        put("meta-data", &self.meta_data);
        for (key, value) in &self.config {
            put("key", key);
            put("value", value);
        }
        for (name, device) in &self.devices {
            put("device", name);
            put("keys", device);
        }
        out
    }

    /// Reads it.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn parse(content: &[u8]) -> Result<Self, String> {
        let rest = content.strip_prefix(HEADER).ok_or("not data of a guest, or of another version")?;
        let mut data = Self::default();
        let (mut key, mut device) = (None, None);
        for line in text::lines(rest) {
            let (field, value) = line?;
            let value = text::string(value);
            match field {
                "instance-type" => data.instance_type = value,
                "location" => data.location = value,
                "meta-data" => data.meta_data = value,
                "key" => key = Some(value),
                "value" => drop(data.config.insert(key.take().ok_or("a value without a key")?, value)),
                "device" => device = Some(value),
                "keys" => drop(data.devices.insert(device.take().ok_or("keys without a device")?, value)),
                // A newer host may say more.
                _ => {}
            }
        }
        Ok(data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_back_as_it_was() {
        let data = GuestData {
            instance_type: "container".into(),
            location: "host".into(),
            meta_data: "a: b\nc: d\n".into(),
            config: [("user.a=b".to_owned(), "1\n\\2\0".to_owned()), ("user.c".to_owned(), String::new())]
                .into(),
            devices: [("eth0".to_owned(), "{\"type\":\"nic\"}".to_owned())].into(),
        };
        assert_eq!(GuestData::parse(&data.render()).unwrap(), data);
        assert!(GuestData::parse(b"something else").is_err());
        assert!(GuestData::parse(&[HEADER, b"value=x\n"].concat()).is_err());
    }
}
