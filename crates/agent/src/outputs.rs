//! What programs print that run in guests while nobody listens, kept by their host with the guest: bounded, and gone with it.

use karst_model::{Error, InstanceId, OperationId};
use serde::{Deserialize, Serialize};

/// Most bytes that are kept of a stream; what comes after is read and dropped.
pub const OUTPUT_BYTES: u64 = 1 << 20;
/// Most streams that are kept of a guest; the oldest makes room.
pub const OUTPUTS: usize = 100;

/// A stream of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl OutputStream {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Stdout, Self::Stderr];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }

    /// What the stream of the program of an operation is called where it is kept.
    pub fn of(self, operation: OperationId) -> String {
        format!("exec_{operation}.{}", self.as_str())
    }
}

/// What a program printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExecOutput {
    /// In which guest.
    pub instance: InstanceId,
    /// The operation that ran it.
    pub operation: OperationId,
    /// Where to.
    pub stream: OutputStream,
}

impl ExecOutput {
    /// Its name among those of its guest.
    pub fn name(&self) -> String {
        self.stream.of(self.operation)
    }

    /// The one of this name; `None` for a name that none has.
    pub fn named(instance: InstanceId, name: &str) -> Option<Self> {
        let (operation, stream) = name.strip_prefix("exec_")?.split_once('.')?;
        let operation = operation.parse().ok()?;
        let stream = OutputStream::ALL.into_iter().find(|s| s.as_str() == stream)?;
        // One spelling each: UUIDs have several.
        Some(Self { instance, operation, stream }).filter(|output| output.name() == name)
    }

    /// That it is not kept.
    pub fn missing(&self) -> Error {
        Error::not_found(format!("log {:?} not found", self.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_which_and_nothing_else() {
        let instance = InstanceId(uuid::Uuid::from_u128(1));
        let operation = OperationId(uuid::Uuid::from_u128(0xab));
        for stream in OutputStream::ALL {
            let output = ExecOutput { instance, operation, stream };
            assert_eq!(ExecOutput::named(instance, &output.name()), Some(output));
        }
        for wrong in [
            "exec_00000000-0000-0000-0000-0000000000AB.stdout",
            "exec_000000000000000000000000000000ab.stdout",
            "exec_00000000-0000-0000-0000-0000000000ab.log",
            "exec_../../agent.stdout",
            "agent.json",
            "",
        ] {
            assert_eq!(ExecOutput::named(instance, wrong), None, "{wrong}");
        }
    }
}
