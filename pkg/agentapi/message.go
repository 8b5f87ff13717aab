package agentapi

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// A message is its length in four bytes, then JSON. The descriptor, if any, goes
// with the first byte.

// header is how many bytes say how long a message is.
const header = 4

func send(conn *net.UnixConn, message any, file *os.File) error {
	text, err := json.Marshal(message)
	if err != nil {
		return fmt.Errorf("encode a message: %w", err)
	}
	if len(text) > maxMessage {
		return fmt.Errorf("a message of %d bytes is too long: %d are allowed", len(text), maxMessage)
	}
	frame := binary.BigEndian.AppendUint32(make([]byte, 0, header+len(text)), uint32(len(text)))
	frame = append(frame, text...)
	var rights []byte
	if file != nil {
		rights = unix.UnixRights(int(file.Fd()))
	}
	n, _, err := conn.WriteMsgUnix(frame, rights, nil)
	if err == nil && n < len(frame) {
		_, err = conn.Write(frame[n:])
	}
	if err != nil {
		return fmt.Errorf("send a message: %w", err)
	}
	return nil
}

// receive reads one message and the descriptor that came with it, which is the
// caller's to close. Descriptors that nobody asked for are closed.
func receive(conn *net.UnixConn, message any) (file *os.File, err error) {
	first := make([]byte, header)
	control := make([]byte, unix.CmsgSpace(4))
	n, controlled, flags, _, err := conn.ReadMsgUnix(first, control)
	if controlled > 0 {
		files, parseErr := descriptors(control[:controlled])
		if len(files) == 1 && parseErr == nil && flags&unix.MSG_CTRUNC == 0 {
			file = files[0]
		} else {
			closeAll(files)
			err = errors.Join(err, parseErr, errors.New("more than one descriptor came with a message"))
		}
	}
	if err == nil {
		err = receiveText(conn, first, n, message)
	}
	if err != nil {
		closeAll([]*os.File{file})
		return nil, fmt.Errorf("receive a message: %w", err)
	}
	return file, nil
}

func receiveText(conn *net.UnixConn, first []byte, n int, message any) error {
	if n == 0 {
		return io.EOF
	}
	if _, err := io.ReadFull(conn, first[n:]); err != nil {
		return err
	}
	size := binary.BigEndian.Uint32(first)
	if size > maxMessage {
		return fmt.Errorf("it is %d bytes long, and %d are allowed", size, maxMessage)
	}
	text := make([]byte, size)
	if _, err := io.ReadFull(conn, text); err != nil {
		return err
	}
	return json.Unmarshal(text, message)
}

func descriptors(control []byte) ([]*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, fmt.Errorf("read what came beside a message: %w", err)
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue // not descriptors
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
