//! The streams of exec and attach, as kubelet carries them: a WebSocket whose messages begin with a channel's number
//! (subprotocol `v4.channel.k8s.io`).

use std::net::TcpStream;
use std::time::Duration;

use tungstenite::client::IntoClientRequest;
use tungstenite::http::HeaderValue;
use tungstenite::{Message, WebSocket};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// A process's streams.
pub struct Streams {
    socket: WebSocket<TcpStream>,
    /// What has come so far.
    pub stdout: String,
    /// What has come so far.
    pub stderr: String,
}

/// A WebSocket to the address that the runtime gives.
fn open(url: &str) -> WebSocket<TcpStream> {
    let url = url.replacen("http://", "ws://", 1);
    let mut request = url.as_str().into_client_request().expect("an address");
    let protocol = HeaderValue::from_static("v4.channel.k8s.io");
    request.headers_mut().insert("Sec-WebSocket-Protocol", protocol);
    let host = request.uri().authority().expect("a host").to_string();
    let stream = TcpStream::connect(host).expect("the streaming server");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a time-out");
    tungstenite::client(request, stream).expect("a WebSocket").0
}

/// A forwarded port: channel 0 carries data, channel 1 the runtime's complaint. Each begins with the port's number.
pub struct Forwarded(WebSocket<TcpStream>);

impl Forwarded {
    pub(crate) fn connect(url: &str, port: i32) -> Self {
        Self(open(&format!("{url}?port={port}")))
    }

    /// Writes `text` and reads until the other end is done.
    ///
    /// # Errors
    /// The runtime's complaint.
    ///
    /// # Panics
    /// Where the connection breaks.
    pub fn request(mut self, text: &str) -> Result<String, String> {
        self.0.send(Message::binary([&[0], text.as_bytes()].concat())).expect("a message is taken");
        let (mut numbers, mut data) = (0, String::new());
        loop {
            match self.0.read() {
                Ok(Message::Binary(_)) if numbers < 2 => numbers += 1,
                Ok(Message::Binary(message)) => {
                    let (channel, bytes) = message.split_first().expect("a channel");
                    let text = String::from_utf8_lossy(bytes).into_owned();
                    if *channel == 1 {
                        return Err(text);
                    }
                    data += &text;
                }
                Ok(Message::Close(_))
                | Err(tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed) => {
                    return Ok(data);
                }
                Ok(_) => {}
                Err(error) => panic!("the connection broke: {error}; {data:?}"),
            }
        }
    }
}

impl Streams {
    /// Connects to the address that the runtime gives for an exec or attach.
    ///
    /// # Panics
    /// Where nobody serves there.
    #[must_use]
    pub fn connect(url: &str) -> Self {
        Self { socket: open(url), stdout: String::new(), stderr: String::new() }
    }

    fn send(&mut self, channel: u8, bytes: &[u8]) {
        let message = [&[channel], bytes].concat();
        self.socket.send(Message::binary(message)).expect("a message is taken");
    }

    /// Writes to the process's input.
    ///
    /// # Panics
    /// Where the connection is broken.
    pub fn write(&mut self, text: &str) {
        self.send(STDIN, text.as_bytes());
    }

    /// Sets the size of the process's terminal.
    ///
    /// # Panics
    /// Where the connection is broken.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        self.send(RESIZE, serde_json::json!({ "Width": columns, "Height": rows }).to_string().as_bytes());
    }

    /// Takes one message. False at the end.
    fn receive(&mut self) -> Option<String> {
        match self.socket.read() {
            Ok(Message::Binary(data)) => {
                let (channel, text) = data.split_first().expect("a channel");
                let text = String::from_utf8_lossy(text);
                match *channel {
                    STDOUT => self.stdout += &text,
                    STDERR => self.stderr += &text,
                    ERROR => return Some(text.into_owned()),
                    other => panic!("channel {other}"),
                }
                None
            }
            Ok(Message::Close(_)) | Err(tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed) => {
                Some(String::new())
            }
            Ok(_) => None,
            Err(error) => panic!("the streams broke: {error}; {:?} {:?}", self.stdout, self.stderr),
        }
    }

    /// Reads until the output holds `text`.
    ///
    /// # Panics
    /// Where the streams end before.
    pub fn read_until(&mut self, text: &str) {
        while !self.stdout.contains(text) {
            if let Some(end) = self.receive() {
                panic!("the streams ended ({end}) before {text:?}: {:?} {:?}", self.stdout, self.stderr);
            }
        }
    }

    /// Reads to the end: the runtime's word on how the process ended, as JSON.
    #[must_use]
    pub fn finish(mut self) -> (String, String, String) {
        let end = loop {
            if let Some(end) = self.receive() {
                break end;
            }
        };
        (end, self.stdout, self.stderr)
    }
}
