//! Errors as libvirt's clients know them: a number (`virErrorNumber`), the part that says it (`virErrorDomain`), and a
//! text that begins with the number's own words, because clients print it as it is.

use crate::xdr::Writer;
use karst_model::{Error, ErrorKind, Missing};

/// Numbers of `virErrorNumber` that Karst says, each with the words that its texts begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Code {
    InternalError = 1,
    NoSupport = 3,
    NoConnect = 5,
    InvalidArg = 8,
    OperationFailed = 9,
    XmlError = 27,
    OperationDenied = 29,
    Rpc = 39,
    NoDomain = 42,
    NoNetwork = 43,
    AuthFailed = 45,
    NoStoragePool = 49,
    NoStorageVol = 50,
    NoNodeDevice = 53,
    OperationInvalid = 55,
    NoInterface = 57,
    NoNwfilter = 62,
    InvalidSecret = 65,
    NoSecret = 66,
    ConfigUnsupported = 67,
    OperationTimeout = 68,
    NoDomainSnapshot = 72,
    ArgumentUnsupported = 74,
    OperationAborted = 78,
    NoDomainMetadata = 80,
    BlockCopyActive = 83,
    OperationUnsupported = 84,
    AgentUnresponsive = 86,
    AccessDenied = 88,
    StorageVolExist = 90,
    CpuIncompatible = 91,
    DeviceMissing = 99,
    NoNwfilterBinding = 101,
    NoDomainCheckpoint = 103,
    NoDomainBackup = 104,
    NoNetworkPort = 107,
}

impl Code {
    fn words(self) -> &'static str {
        match self {
            Self::InternalError => "internal error",
            Self::NoSupport => "this function is not supported by the connection driver",
            Self::NoConnect => "no connection driver available for",
            Self::InvalidArg => "invalid argument",
            Self::OperationFailed => "operation failed",
            Self::XmlError => "XML error",
            Self::OperationDenied => "operation forbidden",
            Self::Rpc => "RPC error",
            Self::NoDomain => "Domain not found",
            Self::NoNetwork => "Network not found",
            Self::AuthFailed => "authentication failed",
            Self::NoStoragePool => "Storage pool not found",
            Self::NoStorageVol => "Storage volume not found",
            Self::NoNodeDevice => "Node device not found",
            Self::OperationInvalid => "Requested operation is not valid",
            Self::NoInterface => "Interface not found",
            Self::NoNwfilter => "Network filter not found",
            Self::InvalidSecret => "Invalid secret",
            Self::NoSecret => "Secret not found",
            Self::ConfigUnsupported => "unsupported configuration",
            Self::OperationTimeout => "Timed out during operation",
            Self::NoDomainSnapshot => "Domain snapshot not found",
            Self::ArgumentUnsupported => "argument unsupported",
            Self::OperationAborted => "operation aborted",
            Self::NoDomainMetadata => "metadata not found",
            Self::BlockCopyActive => "block copy still active",
            Self::OperationUnsupported => "Operation not supported",
            Self::AgentUnresponsive => "Guest agent is not responding",
            Self::AccessDenied => "access denied",
            Self::StorageVolExist => "storage volume",
            Self::CpuIncompatible => "the CPU is incompatible with host CPU",
            Self::DeviceMissing => "device not found",
            Self::NoNwfilterBinding => "Network filter binding not found",
            Self::NoDomainCheckpoint => "Domain checkpoint not found",
            Self::NoDomainBackup => "Domain backup job id not found",
            Self::NoNetworkPort => "network port not found",
        }
    }
}

/// Parts of `virErrorDomain`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Part {
    None = 0,
    Xml = 5,
    Rpc = 7,
    Qemu = 10,
    Lxc = 17,
    Storage = 18,
    Network = 19,
    Domain = 20,
    Nodedev = 22,
    Interface = 26,
    Secret = 30,
    Cpu = 31,
    Nwfilter = 33,
}

/// An error as it goes to a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirError {
    /// Number.
    pub code: Code,
    /// Who says it.
    pub part: Part,
    /// What, without the number's words.
    pub text: String,
}

impl VirError {
    /// An error of `part`.
    pub fn new(code: Code, part: Part, text: impl Into<String>) -> Self {
        Self { code, part, text: text.into() }
    }

    /// A frame or payload that is not of the protocol.
    pub fn rpc(text: impl Into<String>) -> Self {
        Self::new(Code::Rpc, Part::Rpc, text)
    }

    /// What Karst does not do; clients fall back on this number.
    pub fn no_support(what: impl Into<String>) -> Self {
        Self::new(Code::NoSupport, Part::None, what)
    }

    /// The state forbids it now.
    pub fn state(text: impl Into<String>) -> Self {
        Self::new(Code::OperationInvalid, Part::Domain, text)
    }

    /// An argument is wrong.
    pub fn argument(text: impl Into<String>) -> Self {
        Self::new(Code::InvalidArg, Part::Domain, text)
    }

    /// The whole text, as `virGetLastErrorMessage` gives it.
    pub fn message(&self) -> String {
        if self.code == Code::StorageVolExist {
            return format!("storage volume {} exists already", self.text);
        }
        format!("{}: {}", self.code.words(), self.text)
    }

    /// `remote_error`.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        let message = self.message();
        // Level 2 is VIR_ERR_ERROR; str1 is the format and str2 the text, which is where bindings look.
        w.i32(self.code as i32).i32(self.part as i32).optional(Some(&message)).i32(2).u32(0);
        w.optional(Some(self.code.words())).optional(Some(&self.text)).optional(None).i32(-1).i32(-1).u32(0);
        w.finish()
    }
}

impl From<Error> for VirError {
    fn from(e: Error) -> Self {
        // Clients make what is missing, or name another, by these numbers.
        if let (ErrorKind::NotFound, Some(what)) = (e.kind, e.missing) {
            let (code, part) = match what {
                Missing::Network => (Code::NoNetwork, Part::Network),
                Missing::Pool => (Code::NoStoragePool, Part::Storage),
                Missing::Volume => (Code::NoStorageVol, Part::Storage),
            };
            return Self::new(code, part, e.to_string());
        }
        let code = match e.kind {
            ErrorKind::NotFound | ErrorKind::Quota | ErrorKind::Unavailable => Code::OperationFailed,
            ErrorKind::Conflict | ErrorKind::PreconditionFailed => Code::OperationInvalid,
            ErrorKind::Invalid | ErrorKind::TooLarge => Code::InvalidArg,
            ErrorKind::Unauthenticated => Code::AuthFailed,
            ErrorKind::Forbidden => Code::AccessDenied,
            ErrorKind::Unsupported => Code::OperationUnsupported,
            ErrorKind::Timeout => Code::OperationTimeout,
            ErrorKind::Cancelled => Code::OperationAborted,
            ErrorKind::Internal => {
                tracing::error!(error = %e, context = e.context.as_deref().unwrap_or_default(), "a call failed");
                Code::InternalError
            }
        };
        Self::new(code, Part::Domain, e.to_string())
    }
}
